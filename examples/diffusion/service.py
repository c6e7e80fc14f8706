"""Text to image with any diffusers pipeline: a prompt in, a PNG out."""

import io
import os

import torch
from diffusers import DiffusionPipeline

import snowdrop as sd
from snowdrop.domain.errors import InvalidInputError

STEPS_MAX = 100
PIXELS_MAX = 1024


@sd.service(
    image=sd.Image.from_requirements("requirements.txt"),
    model=sd.Model("diffusion"),
    concurrency=1,
    scale=sd.Scale(min=0, max=1, idle_s=300),
    accelerator=["L4", "A10G", "cpu"],
    resources=sd.ResourceSpec(cpus=2, memory_bytes_max=16 << 30),
    startup_s_max=1800,
    env={"HF_HUB_OFFLINE": "1"},
)
class Diffusion:
    @sd.startup
    def load(self, model: sd.LoadedModel) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # A directory with every file in it, fetched as diffusers reads them.
        pipeline = DiffusionPipeline.from_pretrained(
            model.path, torch_dtype=torch.float16 if self.device == "cuda" else torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to(self.device)

    @sd.endpoint("/image")
    def image(
        self, prompt: str, steps: int = 20, seed: int = 0, width: int | None = None, height: int | None = None
    ) -> bytes:
        """A PNG. The same prompt, seed and size give the same image."""
        for name, value, most in (
            ("steps", steps, STEPS_MAX),
            ("width", width, PIXELS_MAX),
            ("height", height, PIXELS_MAX),
        ):
            if value is not None and not 1 <= value <= most:
                raise InvalidInputError(
                    f"{name} is out of range",
                    where=name,
                    next_step=f"1 to {most}",
                    fields=[{"field": name, "problem": f"1 to {most}"}],
                )

        def stop_if_gone(
            pipeline: DiffusionPipeline, _step: int, _time: int, kept: dict[str, object]
        ) -> dict[str, object]:
            if sd.cancelled():
                pipeline._interrupt = True  # noqa: SLF001 -- diffusers' own way to stop between steps
            return kept

        made = self.pipeline(
            prompt,
            num_inference_steps=steps,
            width=width,
            height=height,
            generator=torch.Generator(self.device).manual_seed(seed),
            callback_on_step_end=stop_if_gone,
        )
        file = io.BytesIO()
        made.images[0].save(file, format="PNG")
        return file.getvalue()
