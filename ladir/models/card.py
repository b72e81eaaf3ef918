"""The model card of an export: its README.md, as the Hugging Face Hub shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ladir.config import DenoiserSettings, SampleSettings
from ladir.models.store import load_settings
from ladir.models.weights import ADAPTER_CONFIG_NAME

CARD_FILE = "README.md"
#: an id of the Hub, perhaps with configuration and split behind it
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::[\w.-]+)*")


@dataclass(frozen=True)
class CardFacts:
    """What an export's own files do not say; what is not known is left out of the card.

    ``base``: the LM that was trained on; ``data``: by split the name of the records; ``settings``: further ones, by full name;
    ``training``: by phase what was done; ``results``: a table in Markdown with a line about it; ``license``: as the Hub calls it.
    """

    name: str = "LaDiR"
    base: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    results: str = ""
    license: str | None = None


def write_card(folder: str | Path, facts: CardFacts | None = None) -> None:
    """Write the card of the export in ``folder``."""
    (Path(folder) / CARD_FILE).write_text(model_card(Path(folder), facts or CardFacts()), encoding="utf-8")


def model_card(folder: Path, facts: CardFacts) -> str:
    """The card as text: the Hub's fields, what the model is, how it is asked, what it was trained on, what it can."""
    parts = [
        f"---\n{_metadata(facts).to_yaml()}\n---\n",
        f"# {facts.name}\n",
        _METHOD.format(read=_READ[load_settings(folder, "denoiser")["settings"].get("context", "latents")]),
        _asking(folder.name),
        _PLAIN.format(adapters=_ADAPTERS if (folder / ADAPTER_CONFIG_NAME).is_file() else ""),
        _trained(facts),
        _controls(folder, facts.settings),
        f"## Results\n\n{facts.results or 'This model has not been evaluated yet.'}\n",
        _license(facts),
        _CITATION,
    ]
    return "\n".join(part for part in parts if part)


def _metadata(facts: CardFacts) -> ModelCardData:
    return ModelCardData(
        license=facts.license,
        library_name="ladir",
        pipeline_tag="text-generation",
        tags=["ladir", "latent-diffusion", "reasoning"],
        base_model=facts.base if facts.base and _on_hub(facts.base) else None,
        datasets=list(dict.fromkeys(name.partition(":")[0] for name in facts.data.values() if _on_hub(name))) or None,
    )


def _on_hub(name: str) -> bool:
    """Whether a name is an id of the Hub; what lies here is a file or folder of somebody's own."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _shown(name: str) -> str:
    """A name as strangers should see it: of a file or folder without where it lies."""
    return name if _on_hub(name) else Path(name).name


_METHOD = """This language model reasons in continuous thoughts (LaDiR, *latent diffusion reasoner*,
[arXiv:2510.04573](https://arxiv.org/abs/2510.04573)): a VAE turns each sentence of a chain of thought into a block of latent
tokens; the language model forms such blocks out of noise by flow matching, one after another, and then writes the answer from
question and blocks. {read}
"""

#: by what stands for a finished block (``denoiser.context``)
_READ = {
    "latents": "Every block can be read as text.",
    "text": "A finished block is read as text by the VAE, and its words are what later blocks and the answer see.",
}


def _asking(name: str) -> str:
    return f"""## How to ask it

With the package `ladir`, from this folder:

    python -m ladir "a question" --model {name} --trajectories 5 --trace

```python
from ladir.reasoner import Reasoner

reasoner = Reasoner.from_pretrained("{name}")
for trajectory in reasoner.generate(["a question"], num_trajectories=5)[0]:
    print(trajectory.answer, trajectory.thoughts)
```
"""


_PLAIN = """**`AutoModelForCausalLM.from_pretrained` loads the language model alone, which then reasons without thoughts:** it was
trained to write answers behind blocks, not to reason in words. The maps of the latents lie in `heads.safetensors`, what reads
thoughts in `vae/`; transformers knows neither.{adapters}
"""

_ADAPTERS = " The weights here are adapters, which transformers puts on the base language model where PEFT is installed."


def _trained(facts: CardFacts) -> str:
    rows = [("base language model", facts.base), *((f"{split} records", name) for split, name in facts.data.items())]
    known = [(what, _shown(name)) for what, name in rows if name] + list(facts.training.items())
    return f"## Training\n\n{_table(('what', 'which'), known)}\n" if known else ""


def _controls(folder: Path, more: Mapping[str, Any]) -> str:
    """The settings by which the model was made and is asked, as far as they are not the defaults."""
    saved = load_settings(folder, "denoiser")
    rows = [("vae.latents_per_block", saved["latents_per_block"]), ("vae.latent_dim", saved["latent_dim"])]
    rows += _changed("denoiser", DenoiserSettings(), saved["settings"]) + _changed("sample", SampleSettings(), saved["sample"])
    rows += [(name, value) for name, value in more.items() if name not in dict(rows)]
    return f"## Settings\n\nWhat is not listed is the default.\n\n{_table(('setting', 'value'), rows)}\n"


def _changed(section: str, default: Any, saved: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = [entry.name for entry in fields(default) if entry.name != "train"]
    return [(f"{section}.{name}", saved[name]) for name in names if name in saved and saved[name] != getattr(default, name)]


def _license(facts: CardFacts) -> str:
    stated = f"Licence: `{facts.license}`." if facts.license else "No licence is stated here (`export.license`)."
    return f"## Licence\n\n{stated} Those of the base language model and of the data hold besides.\n"


_CITATION = """## Citation

    @article{kang2025ladir,
      title={LaDiR: Latent Diffusion Enhances LLMs for Text Reasoning},
      author={Kang, Haoqiang and Zhang, Yizhe and Kuang, Nikki Lijing and Majamäki, Nicklas and Jaitly, Navdeep and Ma, Yi-An and
              Qin, Lianhui},
      journal={arXiv preprint arXiv:2510.04573},
      year={2025}
    }
"""


def _table(head: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> str:
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in [head, ("---", "---"), *rows])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
