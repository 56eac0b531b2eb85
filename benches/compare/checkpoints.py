"""The checkpoints that are compared, each made once and kept."""

import json
import os
import subprocess
import sys

import llama_cpp

# cadre's name of a format: llama.cpp's.
FORMATS = {"bf16": "bf16", "q8_0": "Q8_0", "q4_k": "Q4_K_M"}
# Presets of random_checkpoint.py.
SIZES = ["a", "b"]
SKEW = 0.25


class Checkpoints:
    def __init__(self, work, size, root, cadre, llama):
        self.base, self.size, self.root, self.cadre, self.llama = work / f"ckpt-{size}", size, root, cadre, llama

    def original(self):
        """As from the hub, bf16."""
        script = self.root / "tests/reference/random_checkpoint.py"
        return self._made(
            self.base, lambda path: [sys.executable, script, "--output", path, "--preset", self.size, "--skew", SKEW]
        )

    def vocabulary(self):
        return json.loads((self.original() / "config.json").read_text())["vocab_size"]

    def for_cadre(self, format):
        if format == "bf16":
            return self.original()
        return self._made(
            self.base.with_name(f"{self.base.name}-{format}"),
            lambda path: [self.cadre, "pack", "--model", self.original(), "--format", format, "--output", path],
        )

    def for_llama_cpp(self, format):
        path = self.base.with_name(f"{self.base.name}-{FORMATS[format].lower()}.gguf")
        if format == "bf16":
            script = self.root / "tests/reference/to_gguf.py"
            return self._made(path, lambda path: [sys.executable, script, self.original(), path, "--type", "bf16"])
        quantize = self.llama / "llama-quantize"
        return self._made(path, lambda path: [quantize, self.for_llama_cpp("bf16"), path, FORMATS[format]])

    def _made(self, path, command):
        """`path`, made by `command(path)` if it isn't there; a name of its own until it is whole."""
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            words = [str(word) for word in command(part)]
            print("making", path, file=sys.stderr)
            subprocess.run(words, check=True, env=llama_cpp.environment(self.llama), stdout=subprocess.DEVNULL)
            os.rename(part, path)
        return path
