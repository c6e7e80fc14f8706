"""The diffusion example with a pipeline of random weights: the real code of diffusers, small."""

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from snowdrop.domain.errors import InvalidInputError
from snowdrop.sdk.load import load_service
from snowdrop.weights.loaded import LoadedModel

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of diffusers are its own
EXAMPLE = Path(__file__).parents[2] / "examples" / "diffusion"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("tiny", EXAMPLE / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("diffusion") / "model"
    tiny.make(folder)
    return folder


@pytest.fixture
def service(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "service", raising=False)
    threads = torch.get_num_threads()
    cls, _ = load_service(EXAMPLE / "service.py", None)
    instance = cls()  # type: ignore[operator]
    instance.load(LoadedModel.from_directory(str(pipeline), name="diffusion"))
    yield instance
    torch.set_num_threads(threads)
    sys.modules.pop("service", None)


def test_a_prompt_becomes_an_image_that_its_seed_decides(service: Any) -> None:
    from PIL import Image  # noqa: PLC0415

    first = service.image("a flower", steps=2, seed=1, width=16, height=16)
    assert Image.open(io.BytesIO(first)).size == (16, 16)
    assert service.image("a flower", steps=2, seed=1, width=16, height=16) == first
    assert service.image("a flower", steps=2, seed=2, width=16, height=16) != first
    with pytest.raises(InvalidInputError, match="steps"):
        service.image("a flower", steps=0)
