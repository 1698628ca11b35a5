"""What the funnel tests share: tiny configs, models whose every parameter matters, and a slow reference in fp64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors: threads only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared():
    """The folder of references written by other programs; it lies beside the repository and is no part of it."""
    folder = Path(__file__).resolve().parents[3] / "shared"
    if not (folder / "fixtures" / "funnel").is_dir():
        pytest.skip(f"no reference data at {folder}/fixtures/funnel")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """tiny(key=value): a config of 3 blocks, small enough to run thousands of times, published switches on."""

    def make(**keys):
        base = {
            "vocab_size": 50, "d_embed": 16, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24,
            "block_size": "1_1_1", "separate_cls": True, "truncate_seq": True, "pool_q_only": True,
        }  # fmt: skip
        return ModelConfig(**(base | keys))

    return make


@pytest.fixture(scope="session")
def build():
    """build(config): a model in eval mode, every parameter random and far from zero, so that no term can hide."""

    def make(config, seed=0, std=0.3, **kwargs):
        model = FunnelTFM(config, **kwargs).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(1 + noise if name.endswith("layer_norm.weight") else noise)
        return model

    return make


@pytest.fixture(scope="session")
def batch():
    """batch(length): token ids and segment ids, [CLS] first (segment 2), then two segments, no padding."""

    def make(length, rows=2, vocab=50, seed=0):
        generator = torch.Generator().manual_seed(1000 * seed + length)
        inputs = torch.randint(1, vocab, (rows, length), generator=generator)
        seg_id = (torch.arange(length) >= (length + 1) // 2).long().repeat(rows, 1)
        seg_id[:, 0] = 2
        return inputs, seg_id

    return make


@pytest.fixture(scope="session")
def slow():
    return Slow


class Slow:
    """The model as the formulas say it: numpy, fp64, one loop per query and key. Nothing here is taken from the code.

    Positions are lists of numbers, segments lists of ids, masks lists of 1 = pad; one sequence at a time.
    """

    def __init__(self, model):
        self.config = model.net_config
        self.state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-9)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def encoded(self, distance):
        """[sin(p w), cos(p w)], w_i = 10000^(-i / (D / 2))."""
        half = self.config.d_model // 2
        angles = [distance * 10000.0 ** (-i / half) for i in range(half)]
        return np.array([np.sin(a) for a in angles] + [np.cos(a) for a in angles])

    def scores(self, layer, query, key, q_pos, k_pos, q_seg, k_seg, terms=("content", "position", "segment")):
        """(N, Tq, Tk): the sum of the terms, before the mask."""
        w = {
            name.removeprefix(f"attn_layers.{layer}."): value
            for name, value in self.state.items()
            if name.startswith(f"attn_layers.{layer}.")
        }
        config = self.config
        out = np.zeros((config.n_head, len(query), len(key)))
        for n in range(config.n_head):
            for i, x in enumerate(query):
                q = x @ w["q_head.weight"][:, n]
                for j, y in enumerate(key):
                    k = y @ w["k_head.weight"][:, n] + w["k_head.bias"][n]
                    r = self.encoded(q_pos[i] - k_pos[j]) @ w["r_kernel"][:, n]
                    is_cls = config.separate_cls and (i == 0 or j == 0)
                    if "content" in terms:
                        out[n, i, j] += (q + w["r_w_bias"][n]) @ k
                    if "position" in terms and not is_cls:
                        out[n, i, j] += (q + w["r_r_bias"][n]) @ r
                    if "segment" in terms and q_seg is not None and not is_cls:
                        cls = config.seg_id_cls
                        same = q_seg[i] == k_seg[j] or cls in (q_seg[i], k_seg[j])
                        out[n, i, j] += (q + w["r_s_bias"][n]) @ w["seg_embed"][1 if same else 0, n]
        return out / np.sqrt(config.d_head)

    def attend(self, layer, query, key, q_pos, k_pos, q_seg, k_seg, k_mask):
        """(Tq, D): attention with its residual and norm."""
        name = f"attn_layers.{layer}"
        scores = self.scores(layer, query, key, q_pos, k_pos, q_seg, k_seg) - 1e6 * np.array(k_mask, float)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        out = np.zeros((len(query), self.config.d_model))
        for n in range(self.config.n_head):
            values = key @ self.state[f"{name}.v_head.weight"][:, n] + self.state[f"{name}.v_head.bias"][n]
            out += weights[n] @ values @ self.state[f"{name}.post_proj.weight"][n]
        return self.norm(query + out + self.state[f"{name}.post_proj.bias"], f"{name}.layer_norm")

    def feed(self, layer, x):
        name = f"pffn_layers.{layer}"
        h = x @ self.state[f"{name}.pffn.0.weight"] + self.state[f"{name}.pffn.0.bias"]
        if self.config.ff_activation == "relu":
            h = np.maximum(h, 0)
        else:
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        h = h @ self.state[f"{name}.pffn.3.weight"] + self.state[f"{name}.pffn.3.bias"]
        return self.norm(x + h, f"{name}.layer_norm")

    def windows(self, length):
        """Lists of the tokens that become one, in order; None where nothing is left to pool."""
        config, size = self.config, self.config.pooling_size
        first = 1 if config.separate_cls else 0
        end = length - (size - 1) if config.separate_cls and config.truncate_seq else length
        pooled = [list(range(at, min(at + size, end))) for at in range(first, end, size)]
        result = [[0]] * first + pooled
        return result if pooled and len(result) < length else None

    def hiddens(self, inputs, seg, mask):
        """Hidden states and padding masks of every layer of the encoder: [(T', D)], [[0 or 1]]."""
        config, state = self.config, self.state
        x = self.norm(state["input_layer.0.lookup_table"][inputs], "input_layer.1")
        if "input_projection.weight" in state:
            x = x @ state["input_projection.weight"] + state["input_projection.bias"]
        pos, seg, mask = list(range(len(inputs))), None if seg is None else list(seg), list(mask)
        hiddens, masks, layer, pooled = [x], [mask], 0, 0
        join = {"mean": np.mean, "max": np.max, "min": np.min}[config.pooling_type]
        for number, block in enumerate(config.block_size.split("_")):
            n_param, n_repeat = map(int, (block + "x1").split("x")[:2])
            keys = query = (x, pos, seg, mask)
            windows = self.windows(len(x)) if number else None
            if windows:
                pooled += 1
                x = np.stack([join(x[window], axis=0) for window in windows])
                pos = [pos[window[0]] for window in windows]  # every second (third...) position of the block before
                if config.separate_cls:
                    pos[0] = 1 - config.pooling_size**pooled
                seg = None if seg is None else [seg[window[0]] for window in windows]
                mask = [min(mask[at] for at in window) for window in windows]
                query = (x, pos, seg, mask)
                if not config.pool_q_only:
                    keys = query
            for _ in range(n_param):
                for _ in range(n_repeat):
                    x = self.attend(layer, query[0], keys[0], pos, keys[1], seg, keys[2], keys[3])
                    x = self.feed(layer, x)
                    hiddens.append(x)
                    masks.append(mask)
                    keys = query = (x, pos, seg, mask)
                layer += 1
        return hiddens, masks


@pytest.fixture
def write_config(tmp_path):
    """write_config(value): the path of a JSON file that holds it; text is written as it is."""

    def write(value):
        path = tmp_path / "net_config.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write
