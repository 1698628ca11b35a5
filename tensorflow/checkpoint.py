"""TensorFlow checkpoint files to named numpy arrays and back: the one program here that imports TensorFlow.

    python tensorflow/checkpoint.py read CHECKPOINT OUT.npz     # a folder, or the prefix of .index and .data files
    python tensorflow/checkpoint.py write IN.npz PREFIX         # such as DIR/model.ckpt-0
    python tensorflow/checkpoint.py list CHECKPOINT             # names and shapes

It stands alone (TensorFlow and numpy), so that it can run in an environment of its own; `funneltfm convert-ckpt`
calls it.
Names are kept in the array "names", since those of an .npz may hold no "/".
"""

import os
import sys
from pathlib import Path

import numpy as np


def read(checkpoint: str) -> dict[str, np.ndarray]:
    """Every variable of a checkpoint by name."""
    import tensorflow as tf

    prefix = tf.train.latest_checkpoint(checkpoint) if os.path.isdir(checkpoint) else checkpoint.removesuffix(".index")
    if prefix is None or not os.path.isfile(f"{prefix}.index"):
        raise FileNotFoundError(f"no TensorFlow checkpoint (a .index file) at {checkpoint}")
    reader = tf.train.load_checkpoint(prefix)
    return {name: reader.get_tensor(name) for name in sorted(reader.get_variable_to_shape_map())}


def write(variables: dict[str, np.ndarray], prefix: str) -> None:
    """Write variables as a checkpoint that the TensorFlow code reads, with the `checkpoint` file that names it."""
    import tensorflow as tf

    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=[tf.constant(value) for value in variables.values()],
    )
    name = Path(prefix).name
    text = f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
    Path(prefix).with_name("checkpoint").write_text(text, encoding="utf-8")


def to_npz(variables: dict[str, np.ndarray], path: str) -> None:
    np.savez(path, names=np.array(list(variables)), **{str(i): v for i, v in enumerate(variables.values())})


def from_npz(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {str(name): arrays[str(i)] for i, name in enumerate(arrays["names"])}


def main() -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        verb, *rest = sys.argv[1:]
        if verb == "read" and len(rest) == 2:
            to_npz(read(rest[0]), rest[1])
        elif verb == "write" and len(rest) == 2:
            write(from_npz(rest[0]), rest[1])
        elif verb == "list" and len(rest) == 1:
            for name, value in read(rest[0]).items():
                print(f"{name}\t{list(value.shape)}")
        else:
            raise ValueError
    except ValueError as error:
        print(__doc__ if not str(error) else f"checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # TensorFlow has many classes for a damaged file
        print(f"checkpoint.py: error: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3 if isinstance(error, ImportError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
