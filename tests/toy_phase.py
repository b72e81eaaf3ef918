"""A small phase for tests of the runtime: two loss terms, a frozen layer, a branch that some steps do not use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ladir.config import Config, DeepSpeedSettings, TrainSettings


@dataclass
class ToyBatch:
    inputs: Tensor
    targets: Tensor
    sample_ids: list[int]
    counts: dict[str, float]
    num_tokens: int
    kind: str = ""

    def to(self, device: torch.device) -> ToyBatch:
        return dataclasses.replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


class ToyModel(nn.Module):
    """Regression through a frozen layer; odd samples also go through a second head (the term ``odd``).

    ``optional_head``: that head is left out where a micro batch has no odd sample; ranks must then agree on that.
    """

    def __init__(self, optional_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        width, self.optional_head = 6, optional_head
        self.inner = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 15))
        self.frozen = nn.Linear(15, 8).requires_grad_(False)
        self.even_head = nn.Linear(8, 1)
        self.odd_head = nn.Linear(8, 1)
        self.register_buffer("scale", torch.tensor([1.5]))

    def forward(self, batch: ToyBatch) -> dict[str, Tensor]:
        dtype = self.frozen.bias.dtype
        hidden = torch.tanh(self.frozen(self.inner(batch.inputs.to(dtype)))) * self.scale.to(dtype)
        odd = torch.tensor([number % 2 == 1 for number in batch.sample_ids])
        losses = {"all": (self.even_head(hidden).float().squeeze(1) - batch.targets).square().sum()}
        if odd.any() or not self.optional_head:
            losses["odd"] = (self.odd_head(hidden[odd]).float().squeeze(1) + batch.targets[odd]).square().sum()
        losses["metric/size"] = torch.tensor([float(hidden.detach().float().abs().sum()), float(hidden.numel())])
        return losses


class ToyPhase:
    """``num_samples`` random points; noise on the inputs is a function of the sample's number in the run."""

    weights = {"all": 1.0, "odd": 0.5}  # noqa: RUF012

    def __init__(self, num_samples: int = 20, poison: int | None = None, validation: bool = True) -> None:
        self.name, self.num_samples, self.poison = "ar", num_samples, poison
        self.model = ToyModel()
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(num_samples, 6, generator=generator)
        self.targets = self.inputs.sum(1).sin()
        self.validation = ToyPhase(8, validation=False) if validation else None
        self.before_collate = lambda numbers: None

    def collate(self, indices: list[int], numbers: list[int], training: bool = True) -> ToyBatch:
        self.before_collate(numbers)
        inputs = self.inputs[indices].clone()
        if training:
            noise = [torch.randn(6, generator=torch.Generator().manual_seed(number)) for number in numbers]
            inputs += 0.1 * torch.stack(noise)
        if self.poison in numbers:
            inputs[numbers.index(self.poison)] = float("nan")
        odd = sum(index % 2 for index in indices)
        return ToyBatch(inputs, self.targets[indices], indices, {"all": len(indices), "odd": odd}, 6 * len(indices))

    def save(self, folder: Path, state: Iterator[tuple[str, Tensor]]) -> None:
        save_file(dict(state), folder / "model.safetensors")


def toy_config(folder: Path, stage: int = 3, dtype: str = "float32", name: str = "toy", **train: object) -> Config:
    """Settings of a toy run under ``folder``; ``train`` overrides the training settings."""
    config = Config()
    config.run.folder, config.run.name, config.backbone.dtype = str(folder), name, dtype
    settings = {"max_steps": 6, "max_epochs": None, "global_batch": 8, "micro_batch": 4, "lr": 1e-2, "log_every": 1}
    settings["keep_finished"] = True  # for tests that look at checkpoints
    config.ar.train = dataclasses.replace(TrainSettings(), **{**settings, **train})
    config.deepspeed = DeepSpeedSettings(config=f"ds_configs/zero{stage}.json")
    config.telemetry.loggers = []
    return config
