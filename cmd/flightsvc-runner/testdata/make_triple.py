# mypy: disable-error-code="import-untyped,misc,untyped-decorator"
"""Build the operation of triple.cc and a SavedModel with it: x [-1] -> y [-1].

Usage: ``python make_triple.py OUT_DIR``, which gets triple.so and the folder triple. It needs g++.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

SOURCE = Path(__file__).with_name("triple.cc")


def main(out: Path) -> None:
    """Write both."""
    library = out / "triple.so"
    flags = [*tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags()]
    subprocess.run(["g++", "-w", "-shared", "-fPIC", "-o", library, SOURCE, *flags], check=True)
    operations = tf.load_op_library(str(library))

    class Triple(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
        def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"y": operations.flightsvc_triple(x=x)}

    module = Triple()
    tf.saved_model.save(module, str(out / "triple"), signatures=module.serve)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
