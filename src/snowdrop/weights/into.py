"""Tensors into a module: checked by name, shape and kind before anything comes, assigned when all have come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from snowdrop.domain.errors import InvalidInputError
from snowdrop.weights.frameworks import torch_dtype
from snowdrop.weights.plan import PlannedTensor
from snowdrop.weights.stream import floating_to

if TYPE_CHECKING:
    from snowdrop.weights.stream import Dtypes

SHOWN_MAX = 8


class ModuleMismatchError(InvalidInputError, RuntimeError):
    """A module and the weights for it do not fit. `fields` has a line per tensor."""


def module_dtypes(module: torch.nn.Module, dtype: torch.dtype | Literal["module"] | None) -> Dtypes:
    """What each tensor is cast to: a dtype for all floating-point ones, or with "module" that of the module's
    own.
    """
    if dtype != "module":
        return floating_to(dtype)
    own = _own_tensors(module)

    def dtypes(tensor: PlannedTensor) -> torch.dtype | None:
        target = own.get(tensor.entry.name)
        if target is None:
            return None
        return floating_to(target.dtype)(tensor) if target.is_floating_point() else None

    return dtypes


def check_fit(module: torch.nn.Module, tensors: Sequence[PlannedTensor], *, strict: bool) -> None:
    """Raises ModuleMismatchError with every tensor of another shape or kind, and, if strict, missing and
    unexpected.

    Parts of the module that load their state in a way of their own are left to `load_state_dict`.
    """
    own = _own_tensors(module)
    names = {tensor.entry.name for tensor in tensors}
    special = _special_prefixes(module)
    problems: list[dict[str, Any]] = []
    for tensor in tensors:
        target = own.get(tensor.entry.name)
        if target is not None and not _is_special(tensor.entry.name, special):
            problem = _problem(tensor, target)
            if problem:
                problems.append({"name": tensor.entry.name, "file": tensor.path, "problem": problem})
    if strict and not special:
        tied = _partners(module)
        problems += [
            {"name": name, "problem": "missing in the model's files"}
            for name in own
            if name not in names and not any(partner in names for partner in tied.get(name, ()))
        ]
        problems += [
            {
                "name": tensor.entry.name,
                "file": tensor.path,
                "problem": "unexpected: the module has no such tensor",
            }
            for tensor in tensors
            if tensor.entry.name not in own
        ]
    if problems:
        raise _mismatch(module, problems)


def assign(module: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], *, strict: bool) -> Any:
    """Takes all tensors, then `load_state_dict(assign=True)`: until then the module is as it was.

    Names that share a parameter go on sharing it. Raises ModuleMismatchError if the files hold different values
    for two such names, else what `load_state_dict` raises.
    """
    tied = _partners(module)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        partner = next((each for each in tied.get(name, ()) if each in state), None)
        if partner is None:
            state[name] = tensor
            continue
        if not _is_same(state[partner], tensor):
            problem = f"the module shares one parameter for it and {partner}, but the files hold different values"
            raise _mismatch(module, [{"name": name, "problem": problem}])
        state[name] = state[partner]
    for name, partners in tied.items():
        found = state.get(name)
        if found is not None:
            owner = found if isinstance(found, torch.nn.Parameter) else _parameter(module, name, found)
            state.update(dict.fromkeys((name, *partners), owner))
    return module.load_state_dict(state, strict=strict, assign=True)


def _own_tensors(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    state: Mapping[str, Any] = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _partners(module: torch.nn.Module) -> dict[str, list[str]]:
    """For each name whose parameter has other names as well, these."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: [each for each in group if each != name]
        for group in groups.values()
        if len(group) > 1
        for name in group
    }


def _parameter(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=module.get_parameter(name).requires_grad)


def _special_prefixes(module: torch.nn.Module) -> list[str]:
    """Names of parts that change their state while they load it: only `load_state_dict` knows what fits them."""
    plain = torch.nn.Module._load_from_state_dict  # noqa: SLF001 -- to see who overrides it
    special: list[str] = []
    for name, part in module.named_modules():
        hooks: Mapping[int, Callable[..., Any]] = part._load_state_dict_pre_hooks  # noqa: SLF001 -- no public way
        loads = type(part)._load_from_state_dict  # noqa: SLF001 -- as above
        if hooks or (loads is not plain and not _is_torch(type(part))):
            special.append(name)
    return special


def _is_torch(kind: type) -> bool:
    """torch's own overrides add what old files lack; they take the same names and shapes."""
    return kind.__module__.startswith("torch.nn.")


def _is_special(name: str, prefixes: list[str]) -> bool:
    return any(not prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _problem(tensor: PlannedTensor, target: torch.Tensor) -> str:
    if torch.nn.parameter.is_lazy(target):
        return ""
    shape, wanted = tensor.shape, tuple(target.shape)
    if shape != wanted and not (wanted == () and shape == (1,)):
        return f"shape {list(shape)} in the file, {list(wanted)} in the module"
    stored = torch_dtype(tensor)
    if _kind(stored) != _kind(target.dtype):
        return f"{stored} in the file, {target.dtype} in the module"
    return ""


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype is torch.bool else "int"


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one is other or torch.equal(one, other) or torch.equal(_bytes_of(one), _bytes_of(other))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """By which a NaN is the same as itself."""
    return tensor.reshape(-1).view(torch.uint8)


def _mismatch(module: torch.nn.Module, problems: list[dict[str, Any]]) -> ModuleMismatchError:
    lines = [f"{problem['name']}: {problem['problem']}" for problem in problems[:SHOWN_MAX]]
    more = f" and {len(problems) - SHOWN_MAX} more" if len(problems) > SHOWN_MAX else ""
    return ModuleMismatchError(
        f"the weights do not fit {type(module).__name__}: {'; '.join(lines)}{more}",
        where=f"tensor {problems[0]['name']!r}",
        next_step="make the module for these weights, or use strict=False for names that may differ",
        fields=problems,
    )
