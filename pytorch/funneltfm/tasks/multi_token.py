"""Several tokens at once: a decoder's state says the next m tokens, not the next one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funneltfm.errors import InputError

FILE = "multi_token.safetensors"  # beside a model


class MultiToken(nn.Module):
    """From the decoder's states at the places 0, m, 2m, ... alone: z = P h in R^(m d), cut into m vectors, each of
    which goes through the model's own head. So the state at t m, which has seen the tokens before t m, says the tokens
    t m to t m + m - 1. P begins as m unit matrices: as the model was, for the first of them.
    """

    def __init__(self, width: int, m: int):
        super().__init__()
        self.m = m
        self.project = nn.Linear(width, m * width, bias=False)
        with torch.no_grad():
            self.project.weight.copy_(torch.eye(width).repeat(m, 1))
        self.last = False  # take the last state alone

    @classmethod
    def on(cls, model: Any, m: int, source: str | None) -> "MultiToken":
        """Put before the head of a model, whose logits then are (B, m * ceil(T / m), V). source: the folder that the
        model comes from, which may have the projection too.
        """
        head = model.get_output_embeddings()
        made = cls(head.weight.shape[1], m).to(head.weight.dtype)
        path = Path(source or "") / FILE
        if source is not None and path.is_file():
            from safetensors.torch import load_file

            state = load_file(path)
            have = {name: tuple(tensor.shape) for name, tensor in state.items()}
            if have != {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}:
                raise InputError(f"{path} has {have}, which is not for --max_multi_token_predictions={m}.")
            made.load_state_dict(state)
        head.register_forward_pre_hook(made._before_head)
        return made

    def _before_head(self, head: nn.Module, states: tuple[Tensor, ...]) -> Tensor:
        return self(states[0])

    def forward(self, states: Tensor) -> Tensor:
        """(B, T, d) to (B, m * ceil(T / m), d); with `last` to (B, m, d)."""
        few = states[:, -1:] if self.last else states[:, :: self.m]
        return self.project(few).reshape(len(states), few.shape[1] * self.m, -1)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}, folder / FILE)

    @torch.no_grad()
    def generate(self, model: Any, longest: int, encoder_outputs: Any, attention_mask: Tensor) -> Tensor:
        """The likeliest token at each place, m at a time, until every text has ended or has `longest` tokens: (B, T)
        with the decoder's first token, filled up with padding.
        """
        options = model.generation_config
        ends = torch.tensor(options.eos_token_id, device=attention_mask.device).reshape(-1)
        ids = torch.full((len(attention_mask), 1), options.decoder_start_token_id, device=attention_mask.device)
        new, cache = ids, None
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.last = True
        try:
            while ids.shape[1] < longest and not done.all():
                output = model(
                    encoder_outputs=encoder_outputs,
                    attention_mask=attention_mask,
                    decoder_input_ids=new,
                    past_key_values=cache,
                    use_cache=True,
                )
                new, cache = output.logits.argmax(-1), output.past_key_values
                ended = torch.isin(new, ends).long().cumsum(1)
                after = done[:, None] | (ended > 0) & ~(torch.isin(new, ends) & (ended == 1))
                new = new.masked_fill(after, options.pad_token_id)
                done |= ended[:, -1] > 0
                ids = torch.cat([ids, new], dim=1)
        finally:
            self.last = False
        return ids[:, :longest]
