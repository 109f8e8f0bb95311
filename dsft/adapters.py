"""Several results over one base that is loaded once: listed, switched, compared.

    from dsft.adapters import load
    results = load("runs/a", "runs/b", "a_folder_of_pefts")
    results.names()               # ("a", "b", "a_folder_of_pefts")
    results.compare("2 + 2 = ?")  # {"base": "...", "a": "...", "b": "...", ...}
    model = results.switch("b")   # to call, or to generate with, under autocast: docs/chat.md; None: the base alone

Each result has a module tree of its own over the base's tensors, so any method can sit beside any other and none knows
of it; nothing writes into the base, and to switch is to take another tree.
"""

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsft import basis
from dsft.comm.world import World
from dsft.data.dialogue import ends_of, prompt_of
from dsft.engine.precision import DTYPES
from dsft.examined import family_of
from dsft.folder import provenance
from dsft.learned import Learned, learned
from dsft.loaded import load as load_whole
from dsft.loaded import put
from dsft.methods import native
from dsft.methods.stored import shapes
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from dsft.models.generation import generate
from dsft.models.lineage import Lineage
from dsft.models.materialize import materialize
from dsft.models.progress import no_progress_bars
from dsft.models.reach import reach
from dsft.models.source import Pretrained
from dsft.models.values import open_values
from dsft.protocols import Method
from dsft.quantizers.none import Unquantized
from dsft.repairs import computes_bf16
from dsft.results import BASE, TENSORS, Result, find
from dsft.wording import suggest


def load(
    *paths: Path | str, names: Sequence[str] | None = None, device: torch.device | None = None, trust: bool = False,
    trust_remote_code: bool = False,
) -> "Adapters":  # fmt: skip
    """Results of one base: folders of runs, or of adapters, PEFT's or ours; names: instead of their folders' own.

    trust: folders of runs may be such that others write; trust_remote_code: the base model's own code may run. Raises
    ValueError, one line, for what is no result, for another base model, and for one that training saw otherwise.
    """
    groups = by_base(find(paths, names=names, trust=trust, trust_remote_code=trust_remote_code))
    if len(groups) != 1:
        first = " and ".join(group[0].name for group in groups) or "none"
        raise ValueError(f"results must be of one base, packed and computed alike, got {first}; load them apart")
    return Adapters(groups[0], device, trust_remote_code=trust_remote_code)


def by_base(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one base model, told apart by how training saw it; an adapter's folder alone goes with the first."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seen == ""):
        groups.setdefault(result.seen or next(iter(groups), ""), []).append(result)
    return list(groups.values())


class Adapters:
    """results: over one base, as by_base groups them. Whole models (full, freeze) have tensors of their own."""

    def __init__(
        self, results: Sequence[Result], device: torch.device | None = None, *, trust_remote_code: bool = False
    ) -> None:
        self.trust_remote_code = trust_remote_code
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = next((self._read(result.run_dir) for result in results if result.run_dir is not None), None)
        if run is None:
            path, gpus = results[0].base, torch.cuda.device_count()
            model: Any = Pretrained(
                path=path, init="pretrained", revision=None, trust_remote_code=trust_remote_code, config_of=None,
                config=None,
            )  # fmt: skip
            quantization: Any = Unquantized()
            self.precision, seed = "bf16" if computes_bf16(gpus) else "fp32", 0
        else:
            model, quantization, self.precision, seed = run.model, run.quantization, run.train.precision, run.train.seed
        with no_progress_bars():
            run_dirs = [result.run_dir for result in results if result.run_dir is not None]
            for run_dir in run_dirs:
                basis.require_code(model, provenance(run_dir))
            files = model.resolve()
            for run_dir in run_dirs:
                basis.require(run_dir, files)
            self.tokenizer: Any = files.tokenizer()
            self.base = _base(files, quantization, DTYPES[self.precision], seed, self.device)
            self._settings = _settings(files.folder, self.base, self.tokenizer)
        self.base.generation_config = self._settings
        self._results: dict[str | None, Result] = {None: results[0]}
        self._models: dict[str | None, Any] = {None: self.base}
        self._positions: dict[str | None, int] = {None: 0}
        self.current: str | None = None
        for result in results:
            self.add(result)

    def add(self, result: Result) -> None:
        """Load one more. Raises ValueError, one line, if it does not fit the base."""
        with no_progress_bars(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("error", "Found missing adapter keys")
            run = self._read(result.run_dir) if result.run_dir else None
            method = run.method if run else None
            if result.whole:
                assert run is not None
                model = load_whole(run, result.folder).to(self.device)
                model.generation_config = copy.deepcopy(self._settings)
            else:
                try:
                    model = put(_twin(self.base, _held(result.folder)), result.folder, method)
                except Exception as error:  # PEFT's and torch's, of a description that no class can be made of
                    said = " ".join(str(error).partition("Exception raised from")[0].split())[
                        :300
                    ]  # without C++ frames
                    raise ValueError(f"{result.folder} must fit the base {result.base}, got: {said}") from error
        model.eval().requires_grad_(False)
        self._models[result.name], self._results[result.name] = model, result
        self._positions[result.name] = _taken(model, method, result.folder)

    def _read(self, run_dir: Path) -> Learned:
        return learned(run_dir, trust_remote_code=self.trust_remote_code)

    def names(self) -> tuple[str, ...]:
        """Names of the results, in the order in which they were given."""
        return tuple(name for name in self._models if name is not None)

    def switch(self, name: str | None) -> Any:
        """Let name answer from here on, None: the base alone. Returns its model."""
        if name not in self._models:
            raise ValueError(f"there is no result {name}{suggest(str(name), self.names())}")
        self.current = name
        return self._models[name]

    def compare(self, prompt: str, *, max_new_tokens: int = 256, temperature: float = 0.0) -> dict[str, str]:
        """The answers of the base and of every result to one prompt, by name."""
        before, answers = self.current, {}
        try:
            for name in self._models:
                self.switch(name)
                asked = [{"role": "user", "content": prompt}]
                answers[name or BASE] = self.answer(asked, max_new_tokens=max_new_tokens, temperature=temperature)
        finally:
            self.switch(before)
        return answers

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        streamer: Any = None,
    ) -> str:
        """What the current one says to messages ({"role", "content"}, ...); temperature 0: always the likeliest.

        The system message of its training stands before them. streamer: transformers' own, to be told every token.
        Raises ValueError as check does.
        """
        tokens, left = self._fitting(messages)
        room = max_new_tokens if left is None else min(max_new_tokens, left)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with autocast, warnings.catch_warnings():
            # of PEFT 0.21 on prompts: the model then counts by its cache, which has the virtual tokens too
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            return generate(
                self._models[self.current], self.tokenizer, [torch.tensor(tokens)], max_new_tokens=room,
                device=self.device, temperature=temperature, streamer=streamer,
            )[0]  # fmt: skip

    def check(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Raise ValueError, one line, if the current one cannot answer messages: more tokens than it knows, or none."""
        self._fitting(messages)

    def _fitting(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], int | None]:
        """The conversation's tokens, and how many more there is a position for; None: no end is known."""
        result = self._results[self.current]
        system = [{"role": "system", "content": result.system}] if result.system else []
        tokens = prompt_of(self.tokenizer, [*system, *map(dict, messages)], result.joint)
        shape, before = self.base.config.get_text_config(), self._positions[self.current]
        known = reach(shape)
        left = None if known is None else known - before - len(tokens)
        if not tokens or (left is not None and left < 1):
            few = "1 or more" if known is None else f"1 to {known - before - 1}"
            taken = f" less {before} that its method takes" if before else ""
            raise ValueError(
                f"the conversation with {self.current or BASE} must have {few} tokens, the positions that the model "
                f"knows{taken}, got {len(tokens)}; shorten it or begin anew"
            )
        return tokens, left


def _base(files: Any, quantization: Any, dtype: torch.dtype, seed: int, device: torch.device) -> Any:
    """The base as training saw it, packed linears packed, on device; layer by layer, so that it never exists twice."""
    model: Any = build_meta(files, dtype, family_of(files).library)
    model = quantization.convert(model, dissect(model))
    origins = Lineage(model).origins(model)
    values, world = open_values(files, dtype, seed), World(0, 1, 0, device)
    materialize(model, values, world, origins=origins, initial=_nothing_is_new, place=lambda module: None)
    model.to(device).eval().requires_grad_(False)
    model.config.use_cache = True
    return model


def _nothing_is_new(name: str, param: Tensor) -> Tensor:
    raise AssertionError(f"{name} is not the base's")


def _settings(folder: Path | None, base: Any, tokenizer: Any) -> Any:
    """How all of them generate: without the sampling that a model's folder asks for, until one of all known ends."""
    from transformers import GenerationConfig

    own = base.generation_config.eos_token_id
    if folder is not None and (folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(folder).eos_token_id
    ends = ends_of(tokenizer) | {end for end in (own if isinstance(own, list) else [own]) if end is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    return GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=pad, use_cache=True)


def _twin(base: nn.Module, held: set[str]) -> Any:
    """Another module tree over base's tensors: parameters of its own over the same memory, but for those held."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in base.buffers()}
    for name, param in base.named_parameters():
        own = param.detach().clone() if name in held else param.detach()
        memo[id(param)] = nn.Parameter(own, requires_grad=False)
    return copy.deepcopy(base, memo)


def _taken(model: Any, method: Method | None, folder: Path) -> int:
    """Positions that the result takes before a conversation's first token; method: None where nobody knows."""
    if method is None and native.holds(folder):
        method = native.read(folder)
    if method is not None:
        return method.positions
    config = model.active_peft_config
    return int(config.num_virtual_tokens) if config.is_prompt_learning else 0


def _held(folder: Path) -> set[str]:
    """What the adapter in folder holds under names of the base's own tensors, and may write there."""
    names = shapes(folder / TENSORS, "RUN")
    return {re.sub(r"^base_model\.model\.|\.base_layer(?=\.)", "", name) for name in names}
