"""Rewrites a GGUF file with every tensor in float32; run with the Python of an environment that has gguf.

Usage: gguf_to_f32.py IN.gguf OUT.gguf
"""

import os
import sys

import gguf
import numpy as np


def main() -> None:
    source, target = sys.argv[1:3]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    unfinished = target + ".part"
    writer = gguf.GGUFWriter(unfinished, architecture)
    for name, field in reader.fields.items():
        # The writer adds the first two kinds itself.
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, sub_type=field.types[-1] if len(field.types) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, target)


if __name__ == "__main__":
    main()
