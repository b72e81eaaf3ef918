"""Every setting of the stack, as dataclasses: one YAML file plus ``section.key=value`` drives all phases.

The modules here only declare settings (name, type, default, meaning); :mod:`ladir.config.loader` reads and explains them,
:mod:`ladir.config.checks` says which values cannot work.  ``None`` means "not set".
"""

from __future__ import annotations

from dataclasses import dataclass

from ladir.config.asking import EvaluateSettings, ExportSettings, SampleSettings
from ladir.config.declare import section, setting
from ladir.config.model import BackboneSettings, CountdownSettings, DataSettings, GymSettings, LoraSettings, RunSettings
from ladir.config.runtime import DeepSpeedSettings, DemoSettings, PlanSettings, TelemetrySettings
from ladir.config.training import (
    ArSettings,
    DenoiserSettings,
    LatentSettings,
    RlSettings,
    RolloutSettings,
    TrainSettings,
    VaeSettings,
    VerifierSettings,
)

__all__ = [
    "ArSettings",
    "BackboneSettings",
    "Config",
    "CountdownSettings",
    "DataSettings",
    "DeepSpeedSettings",
    "DemoSettings",
    "DenoiserSettings",
    "EvaluateSettings",
    "ExportSettings",
    "GymSettings",
    "LatentSettings",
    "LoraSettings",
    "PlanSettings",
    "RlSettings",
    "RolloutSettings",
    "RunSettings",
    "SampleSettings",
    "TelemetrySettings",
    "TrainSettings",
    "VaeSettings",
    "VerifierSettings",
    "section",
    "setting",
]


@dataclass
class Config:
    stage: str = setting(
        "teacher",
        "what train_denoiser.py trains; teacher: stage 1, behind the true blocks; joint: the same with the VAE trained along, "
        "its latents made in every step; rollout: stage 2, through the model's own blocks",
        ("teacher", "joint", "rollout"),
    )
    run: RunSettings = section(RunSettings, "where a run lies and its seed")
    backbone: BackboneSettings = section(BackboneSettings, "the language model")
    data: DataSettings = section(DataSettings, "records and their blocks")
    countdown: CountdownSettings = section(CountdownSettings, "the Countdown generator (python -m ladir countdown)")
    gym: GymSettings = section(GymSettings, "records from reasoning-gym's generators (python -m ladir gym)")
    vae: VaeSettings = section(VaeSettings, "sentence <-> thought tokens")
    latents: LatentSettings = section(LatentSettings, "encoding the training set")
    denoiser: DenoiserSettings = section(DenoiserSettings, "the flow-matching denoiser")
    rollout: RolloutSettings = section(RolloutSettings, "the denoiser's stage 2: the answer through blocks it generates itself")
    rl: RlSettings = section(RlSettings, "the denoiser's stage 3: reinforcement learning on its own thoughts and answers")
    verifier: VerifierSettings = section(VerifierSettings, "a head that foretells which trajectories will be right")
    ar: ArSettings = section(ArSettings, "the autoregressive baseline")
    sample: SampleSettings = section(SampleSettings, "how a block and an answer are generated")
    export: ExportSettings = section(ExportSettings, "what an export holds")
    evaluate: EvaluateSettings = section(EvaluateSettings, "the evaluation")
    telemetry: TelemetrySettings = section(TelemetrySettings, "what people look at")
    deepspeed: DeepSpeedSettings = section(DeepSpeedSettings, "the engine")
    demo: DemoSettings = section(DemoSettings, "what training/demo.py runs (make demo, make prose)")
    plan: PlanSettings = section(PlanSettings, "what training/plan.py assumes of the data; no phase reads it")
