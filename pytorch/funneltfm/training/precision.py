"""O0 to O3: mixed precision in apex's meaning, in fp16 and bf16, on CUDA and CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from funneltfm.errors import InputError
from funneltfm.training import ranks
from funneltfm.training.optim import is_norm

Level = Literal["O0", "O1", "O2", "O3"]


@dataclass(frozen=True)
class _Meaning:
    autocast: bool = False
    """Weights are fp32; every operation runs in the type that suits it."""
    half: bool = False
    """Weights and activations are half, all but the norms."""
    masters: bool = False
    """The optimizer keeps fp32 copies of the weights between steps; norms stay fp32."""
    scaling: bool = False
    """The loss is scaled so that small gradients survive in fp16; a step with an infinite gradient is skipped."""


# Mixed Precision Training (Micikevicius et al., 2018), under the names of NVIDIA apex.
LEVELS: dict[str, _Meaning] = {
    "O0": _Meaning(),
    "O1": _Meaning(autocast=True, scaling=True),
    "O2": _Meaning(half=True, masters=True, scaling=True),
    "O3": _Meaning(half=True),
}
_MIN_SCALE = 2.0**-10  # a loss that has to be scaled down this far is not going to be right again


# Torch computes these with fp32 weights on half inputs, and returns half.
_MIXED = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def _in_fp32(norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if isinstance(one, Tensor) else one for one in inputs)


class AmpPrecision(Precision):
    """Trains in fp16 or bf16 as `level` says.

    level: O0 is fp32. O1: fp32 weights, autocast. O2: half weights, norms in fp32, fp32 master weights in the
        optimizer. O3: everything half.
    dtype: torch.float16 or torch.bfloat16. With fp16, O1 and O2 scale the loss: by 2^16 at first, half of that after
        a step whose gradients are not finite (the step is skipped), twice that after 2000 good ones. bf16 has the
        range of fp32 and needs no scaling.
    device: "cuda" or "cpu".

    Gradients are unscaled before they are clipped. A checkpoint holds the fp32 masters as its weights, so that what is
    saved is as exact as what was learned. AdamW's moments are fp32 at every level: squares of gradients, about 1e-8,
    vanish in fp16.
    """

    def __init__(self, level: Level, dtype: torch.dtype, device: str):
        if level not in LEVELS:
            raise InputError(f"amp_opt must be one of {', '.join(LEVELS)}; got {level!r}.")
        if dtype not in (torch.float16, torch.bfloat16):
            raise InputError(f"dtype must be torch.float16 or torch.bfloat16; got {dtype}.")
        self.level, self.dtype, self.device = level, dtype, device
        self.meaning = LEVELS[level]
        self.precision = "32-true"  # what Lightning calls it where it asks; the work is done here
        scaling = self.meaning.scaling and dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device) if scaling else None
        self.skipped = 0
        self._scale = 0.0 if self.scaler is None else self.scaler.get_scale()
        self._masters: dict[nn.Parameter, nn.Parameter] = {}

    def __str__(self) -> str:
        return f"{'fp16' if self.dtype == torch.float16 else 'bf16'} {self.level}"

    # ---- the model

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Make weights half in place, and remember them in fp32."""
        if not self.meaning.half:
            return module
        for part in module.modules():
            if self.meaning.masters and is_norm(part):
                if not isinstance(part, _MIXED):
                    part.register_forward_pre_hook(_in_fp32)
                    part.register_forward_hook(self._in_half)
                continue
            for parameter in part.parameters(recurse=False):
                if not parameter.is_floating_point() or parameter in self._masters:
                    continue
                self._masters[parameter] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                parameter.data = parameter.data.to(self.dtype)
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(part, name, buffer.to(self.dtype))
        return module

    def _in_half(self, norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(self.dtype)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with torch.autocast(self.device, self.dtype, enabled=self.meaning.autocast):
            yield

    # ---- a step

    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        """The optimizers update the masters in place of the half weights."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self.optimized(parameter) for parameter in group["params"]]
        return model, optimizers, lr_schedulers

    def optimized(self, parameter: nn.Parameter) -> nn.Parameter:
        """What an optimizer updates in place of a parameter: its master, or the parameter itself."""
        master = self._masters.get(parameter)
        if master is None:
            return parameter
        master.data = master.data.to(parameter.device)
        return master

    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
        if self.scaler is not None:
            tensor = self.scaler.scale(tensor)
        return super().pre_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = closure()  # forward and backward
        self._to_masters()
        if self.scaler is None:
            self._after_closure(model, optimizer)
            optimizer.step(**kwargs)
        else:
            self.scaler.unscale_(optimizer)
            self._after_closure(model, optimizer)  # clips
            self.scaler.step(optimizer, **kwargs)
            self.scaler.update()
            self._count_skipped()
        self._to_weights()
        return result

    def _count_skipped(self) -> None:
        assert self.scaler is not None
        scale = self.scaler.get_scale()
        self.skipped += scale < self._scale
        self._scale = scale
        if scale < _MIN_SCALE:
            ranks.fail(
                InputError(
                    f"{self.skipped} steps had gradients that are not finite in fp16, however small the loss was "
                    f"scaled: training has diverged, or the model does not fit fp16. Lower --lr, or give --bf16 in "
                    f"place of --fp16{', or --amp_opt=O1' if self.level == 'O2' else ''}."
                )
            )

    def _to_masters(self) -> None:
        for parameter, master in self._masters.items():
            if not master.requires_grad:
                continue
            if not self.meaning.masters:  # O3 remembers nothing finer than half between steps
                master.data = parameter.detach().float()
            if parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def _to_weights(self) -> None:
        for parameter, master in self._masters.items():
            if not master.requires_grad:
                continue
            parameter.copy_(master)
            master.grad = None
            if not self.meaning.masters:
                master.data = master.new_empty(0)

    # ---- checkpoints

    def exact_state(self, module: nn.Module) -> dict[str, Tensor]:
        """`module.state_dict()` in fp32: the masters where there are any."""
        masters = self._masters if self.meaning.masters else {}
        exact = {name: masters[p] for name, p in module.named_parameters(remove_duplicate=False) if p in masters}
        return {
            name: exact.get(name, value).detach().float() if value.is_floating_point() else value
            for name, value in module.state_dict().items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict["scaler"])
            self._scale = self.scaler.get_scale()
            self.skipped = state_dict["skipped"]
