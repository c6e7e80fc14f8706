"""`task submit|ls|show|result|cancel|retry|counts|webhook-secret`: durable requests."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from snowdrop.cli.client import Client
from snowdrop.cli.output import JsonFlag, console, context, human_age, human_bytes, reported, say_json, table
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.task import Task, TaskState
from snowdrop.wire.tasks import WAIT_S_MAX, NewTask, TaskCount, TaskPage, WebhookSecret

PAGE = 500
POLL_S = 20
REASON_CHARS = 48
COPY_BYTES = 1 << 20
app = typer.Typer(no_args_is_help=True, help="Tasks: requests that are kept until they have been answered.")
TaskIds = Annotated[list[str], typer.Argument(help="One task or several.")]


@app.command()
def submit(
    deployment: str,
    path: Annotated[str, typer.Argument(help="The endpoint, as in /embed.")] = "/",
    body: Annotated[str | None, typer.Argument(help="JSON, or @FILE with JSON, or - for standard input.")] = None,
    *,
    attempts: Annotated[int | None, typer.Option(help="Attempts at most.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest attempt; 0 leaves it to the deployment.")] = 0.0,
    ttl_s: Annotated[float | None, typer.Option(help="When to give it up.")] = None,
    delay_s: Annotated[float, typer.Option(help="Time before the first attempt.")] = 0.0,
    webhook: Annotated[str, typer.Option(help="URL to tell of its end.")] = "",
    key: Annotated[str, typer.Option(help="Idempotency key: sent twice, it is one task.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its answer and print that.")] = False,
    json: JsonFlag = False,
) -> None:
    """Submit a task; print its id."""
    with reported():
        ctx = context(json=json)
        new = NewTask(
            deployment=deployment,
            path=path if path.startswith("/") else f"/{path}",
            body=_body(body),
            attempts_max=attempts,
            timeout_s=timeout_s,
            ttl_s=ttl_s,
            delay_s=delay_s,
            webhook=webhook,
            idempotency_key=key,
        )
        task = ctx.client.send(Task, "POST", "tasks", body=new)
        if wait:
            _await_end(ctx.client, task.id)
            _print_result(ctx.client, task.id, None)
        elif ctx.json:
            say_json(task)
        else:
            console.print(task.id)


@app.command("ls")
def list_tasks(
    deployment: Annotated[str | None, typer.Option(help="Only of this deployment.")] = None,
    state: Annotated[
        TaskState | None, typer.Option(help="Only in this state; `failed` is the dead letter.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=1_000)] = 20,
    before: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    json: JsonFlag = False,
) -> None:
    """List tasks, newest first."""
    with reported():
        ctx = context(json=json)
        page = ctx.client.get(TaskPage, "tasks", deployment=deployment, state=state, limit=limit, before=before)
        if ctx.json:
            say_json(page)
            return
        shown = table("task", "deployment", "path", "state", "#attempts", "#age", "reason")
        now = time.time_ns()
        for task in page.tasks:
            shown.add_row(
                task.id,
                task.deployment,
                task.call.path,
                task.state,
                f"{task.attempts}/{task.attempts_max}",
                human_age(now, task.submitted_unix_ns),
                task.reason[:REASON_CHARS],
            )
        console.print(shown if page.tasks else "no tasks")
        if page.next:
            console.print(f"more: --before {page.next}", style="dim")


@app.command()
def show(task_id: str, json: JsonFlag = False) -> None:
    """Show a task and what has happened to it."""
    with reported():
        ctx = context(json=json)
        task = ctx.client.get(Task, "tasks", task_id)
        if ctx.json:
            say_json(task)
            return
        now = time.time_ns()
        console.print(f"[bold]{task.id}[/]  {task.state}: {task.reason}", soft_wrap=True)
        request = f"{task.call.method} /{task.deployment}{task.call.path}, {human_bytes(task.call.body_bytes)}"
        facts = {
            "request": request,
            "submitted": f"{human_age(now, task.submitted_unix_ns)} ago",
            "attempts": f"{task.attempts} of {task.attempts_max}",
            "answer": f"{task.answer.status}, {human_bytes(task.answer.body_bytes)}" if task.answer else "",
            "error": str(task.error.message) if task.error else "",
            "key": task.idempotency_key,
        }
        if task.webhook is not None:
            hook = task.webhook
            facts["webhook"] = f"{hook.url}: {hook.state}, {hook.attempts} deliveries {hook.last_error}"
        for name, value in facts.items():
            if value:
                console.print(f"  {name:<10} {value}", markup=False, soft_wrap=True)
        for change in task.history:
            after_s = (change.unix_ns - task.submitted_unix_ns) / 1e9
            console.print(f"  {after_s:>9.2f} s  {change.after:<10} {change.reason}", markup=False, soft_wrap=True)


@app.command()
def result(
    task_id: str,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write it to this file.")] = None,
) -> None:
    """Print the answer's body as it came; fail as the task did."""
    with reported():
        client = context().client
        if wait:
            _await_end(client, task_id)
        _print_result(client, task_id, out)


@app.command()
def cancel(task_ids: TaskIds, json: JsonFlag = False) -> None:
    """End tasks; what runs is cancelled."""
    with reported():
        ctx = context(json=json)
        ended: list[Task] = []
        for name in task_ids:
            ctx.client.delete("tasks", name)
            ended.append(ctx.client.get(Task, "tasks", name))
        _say(ended, json=ctx.json)


@app.command()
def retry(
    task_ids: Annotated[list[str] | None, typer.Argument(help="Failed or cancelled tasks.")] = None,
    all_failed: Annotated[bool, typer.Option("--all", help="Every failed task.")] = False,
    deployment: Annotated[str | None, typer.Option(help="With --all: only of this deployment.")] = None,
    json: JsonFlag = False,
) -> None:
    """Queue failed or cancelled tasks again, with all their attempts."""
    with reported():
        ctx = context(json=json)
        names = list(task_ids or ())
        if bool(names) == all_failed:
            raise InvalidInputError("name tasks, or say --all", where="arguments")
        before: str | None = None
        while all_failed:  # the whole list first: what is tried again leaves it
            page = ctx.client.get(
                TaskPage, "tasks", deployment=deployment, state=TaskState.FAILED, limit=PAGE, before=before
            )
            names += [task.id for task in page.tasks]
            before = page.next
            if not before:
                break
        _say([ctx.client.send(Task, "POST", "tasks", name, "retry") for name in names], json=ctx.json)


@app.command()
def counts(json: JsonFlag = False) -> None:
    """Count tasks by deployment and state."""
    with reported():
        ctx = context(json=json)
        found = ctx.client.get(list[TaskCount], "task-counts")
        if ctx.json:
            say_json(found)
            return
        shown = table("deployment", *(f"#{state}" for state in TaskState))
        for name in sorted({count.deployment for count in found}):
            by_state = {count.state: str(count.count) for count in found if count.deployment == name}
            shown.add_row(name, *(by_state.get(state, "0") for state in TaskState))
        console.print(shown if found else "no tasks")


@app.command("webhook-secret")
def webhook_secret(
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new one; the old goes on signing beside it.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show the secret that signs this tenant's webhooks."""
    with reported():
        ctx = context(json=json)
        if rotate:
            found = ctx.client.send(WebhookSecret, "POST", "task-webhook-secret")
        else:
            found = ctx.client.get(WebhookSecret, "task-webhook-secret")
        if ctx.json:
            say_json(found)
        else:
            console.print(found.secret, soft_wrap=True)


def _body(given: str | None) -> msgspec.Raw:
    if given is None:
        return msgspec.Raw(b"null")
    if given == "-":
        data = sys.stdin.buffer.read()
    elif given.startswith("@"):
        data = Path(given[1:]).read_bytes()
    else:
        data = given.encode()
    try:
        msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise InvalidInputError(
            f"the body is not JSON: {error}", where="BODY", next_step="quote it for the shell, or use @FILE"
        ) from error
    return msgspec.Raw(data)


def _await_end(client: Client, name: str) -> None:
    """Asks again and again: each question has a bound, the task's own time is the last one."""
    while not client.get(Task, "tasks", name, wait=min(POLL_S, WAIT_S_MAX)).ended:
        pass


def _print_result(client: Client, name: str, out: Path | None) -> None:
    with client.raw("tasks", name, "result") as answer:
        if answer.status == 202:
            raise InvalidInputError(
                f"task {name} has not ended",
                where="task",
                next_step="say --wait, or look with `snowdrop task show`",
            )
        target = open(out, "wb") if out is not None else sys.stdout.buffer  # noqa: SIM115 -- closed below
        try:
            while chunk := answer.read(COPY_BYTES):
                target.write(chunk)
            target.flush()
        finally:
            if out is not None:
                target.close()
        if out is None and sys.stdout.isatty():
            console.print()


def _say(tasks: list[Task], *, json: bool) -> None:
    if json:
        say_json(tasks)
        return
    for task in tasks:
        console.print(f"{task.id}  {task.state}: {task.reason}", soft_wrap=True)
    if not tasks:
        console.print("no tasks")
