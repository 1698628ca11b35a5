"""`electra`: a generator fills masks, a discriminator finds what it has replaced (Clark et al. 2020, section 2).

`token_detection_and_masked_lm` is its older name. The discriminator is the product: it is the pipeline's model, and
its encoder is the one that a mixture shares. The generator stands beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError, brief
from funneltfm.tasks.base import IGNORED, Record, Row, load_model
from funneltfm.tasks.heads import backbone_of, n_token_types, save_pretrained
from funneltfm.tasks.masked_lm import MaskedLM
from funneltfm.tasks.sampling import sample
from funneltfm.tasks.token_detection import Detection

GENERATOR = "generator"  # its folder in that of the discriminator


class Electra(Detection):
    """masked_lm_weight * the generator's cross entropy + token_detection_weight * the discriminator's binary one.

    The discriminator sees the text with the generator's samples at the selected tokens; one that equals the original
    is an original. No gradient goes through the samples. They depend on seed, epoch and example alone. Every token but
    padding counts in the discriminator's loss, as in the paper: special ones, which stay as they are, too.
    """

    name = "electra"
    main_metric = "token_detection/f1"
    masks = True

    def __init__(self, args: Any):
        super().__init__(args)
        self.mlm = MaskedLM(args)
        self.sharing = args.embedding_sharing
        if args.tie_generator_discriminator_embeddings:
            if "embedding_sharing" in args.given and self.sharing != "tied":
                raise InputError(
                    f"--tie_generator_discriminator_embeddings means --embedding_sharing tied, but "
                    f"--embedding_sharing={self.sharing} was given too. Leave one out."
                )
            self.sharing = "tied"
        if not 0 < args.generator_size <= 1:
            raise InputError(f"generator_size must be more than 0 and at most 1; got {args.generator_size}.")
        given = sorted({"pre_trained_generator_config", "pre_trained_generator_model", "generator_size"} & args.given)
        if len(given) > 1:
            raise InputError(f"{' and '.join(f'--{name}' for name in given)} all say what the generator is; give one.")

    # ---- data

    def originals(self, example: Example, text: TextEncoder) -> Example:
        real = example.get("attention_mask", np.ones_like(example["input_ids"])) != 0
        return {"detection_originals": np.where(real, example["input_ids"], IGNORED)}

    def prepare(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        originals = self.originals(example, text)
        return self.mlm.prepare(example, rng, text) | originals | {"detection_seed": int(rng.integers(2**63))}

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        batch = super().collate(examples, tokens)
        if not batch:
            return {}
        return (
            batch
            | self.mlm.collate(examples, tokens)
            | {
                "detection_counts": [int((example["masked_lm_labels"] != IGNORED).sum()) for example in examples],
                "detection_seeds": [example["detection_seed"] for example in examples],
            }
        )

    # ---- the generator

    def make_beside(self, model: nn.Module, source: Any, tokenizer: Any) -> nn.Module:
        args = self.args
        own = None if source is None else Path(source) / GENERATOR
        trained = args.pre_trained_generator_model
        if own is not None and not args.pre_trained_generator_config and (own / "config.json").is_file():
            if "generator_size" in args.given and args.train_dataset is not None and trained is None:
                raise InputError(
                    f"--generator_size={args.generator_size} does nothing: {own} has a trained generator. Leave it out "
                    f"to go on with that one, or give --pre_trained_generator_config for another, from scratch."
                )
            trained = trained or str(own)
        config = self._config(model.config, trained)
        for name, least in (("vocab_size", None), ("max_position_embeddings", max(args.max_sequence_length))):
            value, wanted = getattr(config, name, None), least or getattr(model.config, name)
            if value is not None and (value < wanted or (least is None and value != wanted)):
                raise InputError(
                    f"the generator's {name} is {value}, it must be {'at least ' if least else ''}{wanted}, as the "
                    f"discriminator has it. Give another --pre_trained_generator_model or config."
                )
        generator = load_model("AutoModelForMaskedLM", trained, config)
        if self.sharing != "none":
            share = tie_tables if self.sharing == "tied" else disentangle_tables
            share(model, generator, source is not None, trained is not None)
        return generator

    def _config(self, config: Any, trained: str | None) -> Any:
        """The generator's. config: the discriminator's; trained: the checkpoint of a generator, if there is one."""
        import transformers

        path = trained or self.args.pre_trained_generator_config
        if path is None:
            return scaled_config(config, self.args.generator_size, keep_tables=self.sharing != "none")
        try:
            found = transformers.AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers and the hub raise all kinds
            flag = "pre_trained_generator_model" if trained else "pre_trained_generator_config"
            raise InputError(
                f"--{flag}={path} cannot be loaded: {brief(' '.join(str(error).split()), 400)} Give a folder with a "
                f"config.json, or a name on the hub."
            ) from error
        if trained is None:
            names = ("vocab_size", *(f"{name}_token_id" for name in ("pad", "cls", "sep", "mask", "bos", "eos")))
            for name in names:
                if hasattr(config, name) and hasattr(found, name):
                    setattr(found, name, getattr(config, name))
        return found

    def save(self, model: nn.Module, beside: nn.Module | None, folder: Path) -> None:
        super().save(model, beside, folder)
        assert beside is not None
        save_pretrained(beside, folder / GENERATOR)

    def corrupt(self, beside: nn.Module | None, batch: Batch) -> Batch:
        """Put the generator's samples in the place of the selected tokens; "masked_lm_logits" (n, V) are its logits."""
        assert beside is not None
        inputs = dict(batch["inputs"])
        if n_token_types(beside) <= 1:
            inputs.pop("token_type_ids", None)
        logits = self.mlm.logits(beside, backbone_of(beside)(**inputs), batch)
        labels = batch["masked_lm_labels"]
        chosen = labels != IGNORED
        ids = batch["inputs"]["input_ids"].clone()
        ids[chosen] = sample(
            logits.detach(), batch["detection_counts"], batch["detection_seeds"], self.args.sample_function
        )
        return batch | {"inputs": batch["inputs"] | {"input_ids": ids}, "masked_lm_logits": logits}

    # ---- losses and scores

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {
            "masked_lm": self.mlm.loss(batch["masked_lm_logits"], batch),
            "token_detection": self.loss(logits, batch),
        }

    def sizes(self, batch: Batch) -> dict[str, float]:
        sizes = {"masked_lm": self.mlm.size(batch), "token_detection": self.size(batch)}
        return {name: size for name, size in sizes.items() if size is not None}

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        of_generator = self.mlm.train_scores(batch["masked_lm_logits"], batch)
        return _named("token_detection/", super().train_scores(logits, batch)) | _named("masked_lm/", of_generator)

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        both = zip(super().record(logits, batch), self.mlm.record(batch["masked_lm_logits"], batch), strict=True)
        return [own | {"masked_lm": of_generator} for own, of_generator in both]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        of_generator = self.mlm.score([record["masked_lm"] for record in records], features, rows)
        return _named("token_detection/", super().score(records, features, rows)) | _named("masked_lm/", of_generator)

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """What Detection gives, and the generator's mean loss and how many tokens were selected for it."""
        of_generator = self.mlm.predict([record["masked_lm"] for record in records], features, rows)
        for row, other in zip(super().predict(records, features, rows), of_generator, strict=True):
            yield row | {"masked_lm_loss": other["loss"], "selected": other["selected"]}


def _named(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in scores.items()}


# ---- a smaller model of the same kind

_WIDTH = ("hidden_size", "d_model", "dim", "pooler_hidden_size")
_INNER = ("intermediate_size", "d_inner", "hidden_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HEAD_WIDTH = ("d_head", "head_dim")
_LAYERS = ("num_hidden_layers", "n_layers")
_TABLE = ("embedding_size", "d_embed")  # the width of the embeddings, where that is not the hidden one


def scaled_config(config: Any, size: float, keep_tables: bool) -> Any:
    """A config of the same architecture: hidden width, heads and feed-forward width times `size`.

    keep_tables: the embeddings must stay as wide as they are. Where the architecture has a width of its own for them
    they do; elsewhere it is the number of layers that is scaled. Raises InputError where sizes do not come out.
    """
    keys = config.to_dict()
    for name in ("id2label", "label2id", "architectures"):  # what is the discriminator's
        keys.pop(name, None)

    def times(names: Sequence[str]) -> dict[str, int]:
        found = {name: max(1, round(keys[name] * size)) for name in names if isinstance(keys.get(name), int)}
        if not found:
            raise InputError(
                f"--generator_size: a config of the type {config.model_type} has none of {', '.join(names)}, so it "
                f"cannot be scaled. Give --pre_trained_generator_config."
            )
        return found

    if keep_tables and not any(name in keys for name in _TABLE):
        changed: dict[str, Any] = times(_LAYERS)
        if keys.get("layer_types"):
            changed["layer_types"] = keys["layer_types"][: next(iter(changed.values()))]
    else:
        width, heads = times(_WIDTH), times(_HEADS)
        hidden, n = next(iter(width.values())), next(iter(heads.values()))
        if hidden % n and not any(name in keys for name in _HEAD_WIDTH):
            n_own = next(keys[name] for name in heads)
            raise InputError(
                f"--generator_size={size}: {hidden} hidden units do not divide among {n} heads. Take {n / n_own:.4f} "
                f"({n} of {n_own} heads), or give --pre_trained_generator_config."
            )
        changed = width | heads | times(_INNER)
    return type(config).from_dict(keys | changed)


# ---- shared embeddings


def _tables(model: nn.Module, generator: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules with the token embeddings of both, which must have the same shape."""
    own, other = (backbone_of(one).get_input_embeddings() for one in (model, generator))  # type: ignore[operator]
    if own.weight.shape != other.weight.shape:
        raise InputError(
            f"embeddings can be shared where both have the same shape; the discriminator's is "
            f"{tuple(own.weight.shape)}, the generator's {tuple(other.weight.shape)}. Take --embedding_sharing none, "
            f"or a generator whose embeddings are as wide."
        )
    return own, other


def _holder(model: nn.Module, table: nn.Module) -> nn.Module:
    """The module that `table` is a child of: it has the other embeddings and their norm too."""
    return next(module for module in model.modules() if any(child is table for child in module.children()))


def tie_tables(model: nn.Module, generator: nn.Module, trained: bool, generator_trained: bool) -> None:
    """One set of embeddings for both (ES): tokens, and positions, types and norm where they have the same shape. The
    trained ones are taken, the discriminator's where both or none are.
    """
    table, other = _tables(model, generator)
    holder = _holder(generator, other)
    theirs = dict(holder.named_parameters())
    for name, parameter in _holder(model, table).named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            if generator_trained and not trained:
                parameter.data.copy_(theirs[name].data)
            path, _, leaf = name.rpartition(".")
            setattr(holder.get_submodule(path), leaf, parameter)
    generator.tie_weights()  # type: ignore[operator]


class Disentangled(nn.Module):
    """E = stop-gradient(E_G) + E_delta: what the discriminator's table is, where E_delta is trained (He et al. 2021,
    DeBERTaV3, section 3.2). A parametrization for torch.nn.utils.parametrize.
    """

    def __init__(self, of_generator: nn.Module):
        super().__init__()
        self._of_generator = (of_generator,)  # in a tuple: it is a part of the generator, not of this

    def _table(self) -> Tensor:
        weight: Any = self._of_generator[0].weight
        return weight.detach()

    def forward(self, delta: Tensor) -> Tensor:
        return self._table() + delta

    def right_inverse(self, table: Tensor) -> Tensor:
        return table.detach() - self._table()


@torch.no_grad()
def disentangle_tables(model: nn.Module, generator: nn.Module, trained: bool, generator_trained: bool) -> None:
    """Gradient-disentangled embeddings (GDES): the generator's loss alone trains its table, E_G, the discriminator's
    loss E_delta alone, which starts at 0 but where both models are trained already. Saved, the discriminator has the
    sum as an ordinary table; checkpoints of the training have both.
    """
    table, other = _tables(model, generator)
    if not trained:
        table.weight.copy_(other.weight)  # type: ignore[operator, arg-type]
    elif not generator_trained:
        other.weight.copy_(table.weight)  # type: ignore[operator, arg-type]
    name = next(name for name, parameter in table.named_parameters(recurse=False) if parameter is table.weight)
    parametrize.register_parametrization(table, name, Disentangled(other))
