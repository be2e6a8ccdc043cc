"""A part of `gpu.py`: how many graphs `compile: true` makes at the paper's depth with dropout.

In: a `Case`.  Out: its rows: the graphs, and as goal and limit the kinds of units that are compiled. Widths are small
and all is on a CPU, neither of which changes what is compiled.
"""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from gpu_rows import Case
from gpu_steps import SMALL, compile_with, layout, paper_config
from torch import nn

from vqscale.engine.parallel import compile_units
from vqscale.models.dropout import dropout_key
from vqscale.models.init import initialise
from vqscale.models.prior import PriorConfig, nll
from vqscale.models.quantizer import QuantizerConfig
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.sources import PRIORS
from vqscale.stages import train_vqvae


def graphs(case: Case) -> None:
    for name, make in {"pixelcnn": pixelcnns, "transformer": transformers, "vqvae": small_vqvae}.items():
        with case.rows.attempt(f"graphs/{name}"):
            counted = [compiled_graphs(*model_and_step) for model_and_step in make()]
            made, kinds = (sum(column) for column in zip(*counted, strict=True))
            case.rows.put(f"graphs/{name}", made, goal=kinds, limit=kinds)


def pixelcnns() -> list[tuple[Any, Callable[[], None]]]:
    """The top prior and the bottom one, whose layers are conditioned."""
    tops = [dataclasses.replace(paper_config(level), **SMALL) for level in ("top", "bottom")]
    return [small_prior(config, upper) for config, upper in zip(tops, ([], [(2, 2)]), strict=True)]


def transformers() -> list[tuple[Any, Callable[[], None]]]:
    """As deep as the paper's PixelCNNs."""
    layers = paper_config("top").layers
    shared: dict[str, Any] = {"hidden": 16, "residual": 16, "heads": 2, "dropout": 0.1, "layers": layers}
    config = PriorConfig("transformer", conditioning_layers=layers, **shared)
    return [small_prior(config, upper) for upper in ([], [(2, 2)])]


def small_prior(config: PriorConfig, upper: list[tuple[int, int]]) -> tuple[Any, Callable[[], None]]:
    """(the prior on a 4x4 grid, a forward and a backward pass of it in training)."""
    model: Any = PRIORS[config.kind](config, num_codes=11, grid=(4, 4), num_classes=3, upper_grids=upper)
    initialise(model, seed=0)
    codes, label = torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    above, key = [codes[:, :2, :2] for _ in upper], dropout_key(0, torch.arange(2))
    return model, lambda: nll(model(codes, label, above, dropout_key=key), codes).backward()


def small_vqvae() -> list[tuple[Any, Callable[[], None]]]:
    config = VQVAEConfig(hidden=16, residual_hidden=8, quantizer=QuantizerConfig(num_codes=16, code_dim=8))
    model = VQVAE(config, resolution=32)
    initialise(model, seed=0)
    batch: Any = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "position": torch.arange(2)}
    return [(model, lambda: train_vqvae.training_step(train_vqvae.TrainVQVAEConfig())(model, batch)[0].backward())]


def compiled_graphs(model: nn.Module, step: Callable[[], None]) -> tuple[int, int]:
    """(graphs that `compile: true` makes in two training steps, kinds of the units that it compiles).

    A kind is what a graph of fixed shapes has to tell apart: a class with its parameters' and its inputs' shapes.
    """
    torch.compiler.reset()
    units: list[nn.Module] = []
    with mock.patch.object(nn.Module, "compile", lambda unit, **_options: units.append(unit)):
        compile_units(model)
    kinds: set[Any] = set()

    def note(unit: nn.Module, inputs: Any) -> None:
        weights = tuple(tuple(parameter.shape) for parameter in unit.parameters())
        kinds.add((type(unit), weights, tuple(layout(value) for value in inputs)))

    model.train()
    hooks = [unit.register_forward_pre_hook(note) for unit in units]
    step()
    for hook in hooks:
        hook.remove()
    made: list[Any] = []

    def count(graph: Any, _inputs: Any, **_options: Any) -> Any:
        made.append(graph)
        return graph.forward

    compile_with(count, model)
    for _ in range(2):
        step()
    torch.compiler.reset()
    return len(made), len(kinds)
