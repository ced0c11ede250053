"""Remote code: what travels with a checkpoint so that ``trust_remote_code=True`` loads it without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_moe.moe import non_uniform, skipping

MODELLING_FILE = "modeling_non_uniform_moe.py"
"""The name under which the code of a model that needs some lies beside its weights."""

SKIPPING_FILE = "expert_skipping.py"
"""The same, of what that code needs to skip experts."""

CLASS_PREFIXES = ("NonUniform", "Skipping")


def add_modelling_file(config: dict[str, Any], folder: Path) -> None:
    """Write the code that a model needs, if any, into ``folder`` and name it in ``config``; else undo both.

    Layers of different sizes need code, and so does skipping experts. Stock transformers leaves it aside, so a
    uniform model still loads there and does not skip.
    """
    holder = config.get("text_config", config)
    file, skipping_file = folder / MODELLING_FILE, folder / SKIPPING_FILE
    base = (config.get("architectures") or [""])[0]
    for prefix in CLASS_PREFIXES:
        base = base.removeprefix(prefix)
    if base:
        config["architectures"] = [base]
    non_uniform_layers, entry = bool(holder.get("per_layer_config")), holder.get(skipping.CONFIG_KEY)
    for old in (file, skipping_file):
        old.unlink(missing_ok=True)
    if not non_uniform_layers:
        for name in ("per_layer_config", "allow_global_per_layer_attribute_access"):
            holder.pop(name, None)
        if not (entry and entry["active"]):
            if file.name.removesuffix(".py") in json.dumps(config.get("auto_map", {})):
                del config["auto_map"]
            return
    name = f"{CLASS_PREFIXES[0 if non_uniform_layers else 1]}{base}"
    config["auto_map"] = {"AutoModelForCausalLM": f"{file.name.removesuffix('.py')}.{name}"}
    imported, attached = "", ""
    if entry:
        skipping_file.write_text(Path(skipping.__file__).read_text())
        imported = f"\nfrom .{skipping_file.name.removesuffix('.py')} import attach_skipping  # noqa: E402\n"
        attached = "        attach_skipping(self, {block.index: block.experts for block in find_blocks(self)})\n"
    code = Path(non_uniform.__file__).read_text()
    file.write_text(
        f"{code}\n\nfrom transformers import {base}  # noqa: E402\n{imported}\n\n"
        f"class {name}({base}):\n"
        f'    """{base} with its own number of experts in each layer{", and skipping" if entry else ""}."""\n\n'
        "    # transformers looks for a decorator in the file of the class, which stands in that of the base.\n"
        "    _can_set_experts_implementation_cached_value = True\n\n"
        "    def __init__(self, config: Any) -> None:\n"
        "        super().__init__(config)\n"
        "        resize_moe_layers(self)\n"
        f"{attached}"
    )
