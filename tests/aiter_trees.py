"""Trees of files that go by the name of aiter, and what an import may change of a process."""

import logging
import sys

import torch._dynamo.config

from fusionpasses import _aiter_files

RMS = "x1, x1_weight, x1_epsilon, x2=None, x2_weight=None, x2_epsilon=0.0, res1=None, shuffle=False"
ROPE = (
    "q_nope, q_pe, k_nope, k_pe, kv_cache, slot_mapping, pos, cos, sin, k_scale, is_neox, num_decode_toks_for_zeros=0, "
    "apply_scale=True, q_out=None, decode_q_pe_out=None, k_pe_out=None, q_out_dtype=None"
)
HIP_ROPE = (
    "q_nope, q_pe, kv_c, k_pe, kv_cache, q_out, slot_mapping, k_scale, q_scale, positions, cos_cache, sin_cache, "
    "is_neox, is_nope_first"
)
GEMM = "x, w, x_scales, w_scales, dtype=None, y=None, config=None"


def function(name, parameters, answer="None"):
    return f"def {name}({parameters}):\n    return {answer}\n"


#: What AITER's decorators leave of a signature.
GUARD = (
    "def guard(f):\n    def wrapper(*args, **kwargs):\n        return f(*args, **kwargs)\n    return wrapper\n@guard\n"
)
PRESHUFFLE = "x_fp4, w_preshuf, x_scales, w_scales, dtype=None, y=None, config=None, skip_reduce=False"

NEW = {
    "__init__.py": "",
    "ops/__init__.py": "",
    "ops/triton/__init__.py": "",
    "ops/triton/gemm/__init__.py": "",
    "ops/triton/gemm/basic/__init__.py": "",
    "ops/triton/quant/__init__.py": "from .quant import dynamic_mxfp4_quant\n",
    "ops/triton/quant/quant.py": function("dynamic_mxfp4_quant", "x, scaling_mode='even'", "'new quant'"),
    "ops/triton/quant/fused_mxfp4_quant.py": function(
        "fused_rms_mxfp4_quant",
        f"{RMS}, scale_shuffle_padding=False, output_unquantized_inp1=False, inargs='auto'",
        "'new rms'",
    ),
    "ops/triton/activation.py": function(
        "act_mul_and_mxfp4_quant",
        "x, activation, scaling_mode='even', shuffle=False, scale_shuffle_padding=False",
    ),
    "ops/triton/fusions/__init__.py": "",
    "ops/triton/fusions/fused_kv_cache.py": GUARD
    + function(
        "fused_qk_rope_cat_and_cache_mla", f"{ROPE}, shuffled_kv_cache=False, upcast_operand=False", "'new rope'"
    ),
    "ops/cache.py": GUARD
    + function("fused_qk_rope_concat_and_cache_mla", f"{HIP_ROPE}, compute_all_q_rope=False", "'new HIP rope'"),
    "ops/triton/gemm/basic/gemm_afp4wfp4.py": function("gemm_afp4wfp4", f"{GEMM}, skip_reduce=False")
    + function("gemm_afp4wfp4_preshuffle", PRESHUFFLE)
    + function("gemm_afp4wfp4_preshuffled_scales", GEMM),
}

OLD = {
    "__init__.py": "",
    "ops/__init__.py": "",
    "ops/cache.py": "def reshape_and_cache(key, value):\n    return None\n",
    "ops/triton/__init__.py": "",
    "ops/triton/quant.py": function("dynamic_mxfp4_quant", "x, scaling_mode='even'", "'old quant'"),
    "ops/triton/fused_mxfp4_quant.py": function(
        "fused_rms_mxfp4_quant", f"{RMS}, scale_shuffle_padding=False", "'old rms'"
    ),
    "ops/triton/activation.py": function(
        "act_mul_and_mxfp4_quant", "x, activation, scaling_mode='even', shuffle=False"
    ),
    "ops/triton/fused_kv_cache.py": function("fused_qk_rope_cat_and_cache_mla", ROPE, "'old rope'"),
    "ops/triton/gemm_afp4wfp4.py": function("gemm_afp4wfp4", GEMM)
    + function("gemm_afp4wfp4_preshuffle", f"{GEMM}, use_aot=True")
    + function("gemm_afp4wfp4_preshuffled_scales", GEMM),
}

NEW["ops/triton/_triton_kernels/quant/quant.py"] = function("_mxfp4_quant_op", "x", "'to even'")
OLD["ops/triton/_triton_kernels/quant.py"] = function("_mxfp4_quant_op", "x", "-x")
#: What these round by, in the place of what AITER does.
ROUNDINGS = {
    _aiter_files.digest(NEW["ops/triton/_triton_kernels/quant/quant.py"], "_mxfp4_quant_op"): "new",
    _aiter_files.digest(OLD["ops/triton/_triton_kernels/quant.py"], "_mxfp4_quant_op"): "old",
}

#: The modules of aiter 0.13.20191203, the only release on the index of a library for async iterators.
ITERATORS = (
    "active_aiter",
    "aiter_forker",
    "aiter_to_iter",
    "azip",
    "deferred_coroutine",
    "event_stream",
    "flatten_aiter",
    "gated_aiter",
    "iter_to_aiter",
    "join_aiters",
    "map_aiter",
    "map_filter_aiter",
    "parallel_map_aiter",
    "preload_aiter",
    "push_aiter",
    "server",
    "sharable_aiter",
    "simple_map_aiter",
    "stoppable_aiter",
)
WRONG = {
    "__init__.py": "from .azip import azip\n",
    **{f"{name}.py": f"async def {name}(*aiters):\n    yield aiters\n" for name in ITERATORS},
}

#: What AITER's import does before it raises, and some more.
DEBRIS = """
import logging, pathlib, sys, types
import torch._dynamo.config

from fusionpasses import _aiter_files
here = pathlib.Path(__file__).parent
sys.path.insert(0, str(here / "jit" / "utils"))
import build_targets
from . import jit
sys.modules["made_by_hand"] = types.ModuleType("made_by_hand")
sys.modules["colorsys_of_aiter"] = sys.modules["build_targets"]
class Finder:
    def find_spec(self, name, path=None, target=None):
        return None
sys.meta_path.insert(0, Finder())
logger = logging.getLogger("aiter")
logger.addHandler(logging.StreamHandler())
logger.setLevel(logging.INFO)
logger.propagate = False
logging.getLogger("aiter.jit").setLevel(logging.DEBUG)
logging.getLogger("of_a_user").setLevel(logging.CRITICAL)
logging.getLogger("AITER_TRITON").addHandler(logging.NullHandler())
logging.getLogger().addHandler(logging.NullHandler())
torch._dynamo.config.ignore_logger_methods = (logging.Logger.info, logger.info)
torch._dynamo.config.cache_size_limit = 12345
with open(here / "tries", "a") as file:
    file.write("x")
"""
BROKEN = {
    **NEW,
    "__init__.py": f"{DEBRIS}raise RuntimeError('ROCm version file not found')\n",
    "jit/__init__.py": "",
    "jit/utils/build_targets.py": "GFX_MAP = {}\n",
}
#: The same, but for the last line.
LIVING = {**BROKEN, "__init__.py": DEBRIS}


def write(folder, files):
    """Writes a package named aiter into a folder."""
    for name, text in files.items():
        file = folder / "aiter" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "aiter"


def of_logger(logger):
    return list(logger.handlers), list(logger.filters), logger.propagate, logger.level, logger.disabled


def state():
    """What an import may change of a process."""
    loggers = {n: each for n, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)}
    return {
        "path": list(sys.path),
        "meta_path": list(sys.meta_path),
        "modules": dict(sys.modules),
        "loggers": {name: of_logger(logger) for name, logger in {"": logging.root, **loggers}.items()},
        "dynamo": torch._dynamo.config.get_config_copy(),
        "ignored": torch._dynamo.config.ignore_logger_methods,
    }


def changes(before):
    """The names of what differs from ``before``."""
    now = state()
    return [name for name in before if now[name] != before[name]]
