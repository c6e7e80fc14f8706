"""Writes docs/reference/states.md from the transition table. Run by hand after a change of the table:

python docs/generate_states.py            # writes the page
python docs/generate_states.py --check    # exit code 1 if the page is not what the table says
"""

from __future__ import annotations

import sys
from pathlib import Path

from snowdrop.domain.replica import TERMINAL_STATES, ReplicaState
from snowdrop.policy.lifecycle import TABLE, Event

PAGE = Path(__file__).parent / "reference" / "states.md"

HEAD = """# Replica states

Generated from `TABLE` in `src/snowdrop/policy/lifecycle.py` by `python docs/generate_states.py`; do not edit.

```
pending -> mounting -> starting -> loading -> ready -> draining -> stopped
              \\___________\\___________\\________\\____________________> failed
```

| state | what happens in it | longest |
|---|---|---|
| pending | ordered by control | one step |
| mounting | code and models are brought to the node | `agent.content_s_max` |
| starting | the sandbox starts, the service is imported | `import_s_max` |
| loading | `startup` runs | `startup_s_max` |
| ready | it may get requests | no bound |
| draining | it gets no more requests; those in flight end, `shutdown` runs | `drain_s_max` + 5 s |
| stopped | ended as ordered | for ever |
| failed | ended otherwise; the report carries the error | for ever |

## Transitions

The agent carries instructions out in the order given. An event without a row raises `IllegalTransition` with
the replica's history.

| state | event | next state | instructions |
|---|---|---|---|
"""

TAIL = """
In `stopped` and `failed` every event is ignored: what was under way when the end came may still report.
"""


def render() -> str:
    """The page's text."""
    rows: list[str] = []
    for state in ReplicaState:
        if state in TERMINAL_STATES:
            continue
        for event in Event:
            row = TABLE.get((state, event))
            if row is not None:
                after, instructions = row
                shown = ", ".join(instructions) or "none"
                rows.append(f"| {state} | {event} | {after} | {shown} |\n")
    return HEAD + "".join(rows) + TAIL


def main(arguments: list[str]) -> int:
    """Writes the page, or with `--check` compares it."""
    if arguments == ["--check"]:
        same = PAGE.read_text() == render()
        if not same:
            sys.stderr.write(f"{PAGE} is not what the table says: run `python docs/generate_states.py`\n")
        return 0 if same else 1
    PAGE.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
