"""``torch.compile(model, backend=fusion_backend())``: Inductor, with the fusion passes in its post-grad hook."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusionpasses import providers, records
from fusionpasses.anchors import Anchor, registered_anchors
from fusionpasses.config import FusionConfig, did_you_mean, resolve_inductor_options
from fusionpasses.dump import DumpFolder
from fusionpasses.errors import BadConfig, FusionError
from fusionpasses.report import CACHE_UNKNOWN, COMPILED, GraphReport, Report

if TYPE_CHECKING:
    from torch import fx

records.register_artifact()

log = logging.getLogger(__name__)

_HOOK = "post_grad_custom_pre_pass"

_last_report = Report()


def last_report() -> Report:
    """The report of the backend that compiled last in this process; an empty one before anything was compiled."""
    return _last_report


class FusionBackend:
    """A torch.compile backend; made by :func:`fusion_backend`.

    Two backends with the same settings are equal, so that Dynamo does not compile again for the second.
    """

    compiler_name = "fusionpasses"
    __name__ = "fusionpasses"

    def __init__(self, config: FusionConfig, anchors: tuple[Anchor, ...]) -> None:
        self.config = config
        self.anchors = anchors
        self.report = Report()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FusionBackend)
            and type(self) is type(other)
            and (self.config, self.anchors) == (other.config, other.anchors)
        )

    def __hash__(self) -> int:
        return hash((self.config, self.anchors))

    def __deepcopy__(self, memo: dict[int, Any]) -> FusionBackend:
        # transformers' CompileConfig copies the backend it was given; the copy must report to the same place.
        return self

    def __repr__(self) -> str:
        return f"fusion_backend({self.config})"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        from torch._dynamo.exc import BackendCompilerFailed

        try:
            return self._compile(gm, example_inputs, mode, options)
        except FusionError as error:
            raise as_dynamo_error(self, error) from None
        except BackendCompilerFailed as error:  # Inductor wraps what a pass raises
            if isinstance(error.inner_exception, FusionError):
                raise as_dynamo_error(self, error.inner_exception) from None
            raise

    def _compile(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
    ) -> Any:
        from torch._guards import CompileContext
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        from fusionpasses import direct_calls
        from fusionpasses.dynamo_floats import specialize_norm_eps
        from fusionpasses.pipeline import Pipeline, compose

        patches = resolve_inductor_options(mode, options)
        direct_calls.register()
        specialize_norm_eps(gm, self.anchors)
        dump = DumpFolder.from_environment()
        session = _Session(self, str(CompileContext.current_compile_id() or "?"), records.SourceIndex(gm))
        pipeline = Pipeline(
            self.config,
            self.anchors,
            record=session.add,
            lookup=session.lookup,
            compile_id=session.compile_id,
            dump=dump,
        )
        hook, warning = compose(patches.pop(_HOOK, None), pipeline)
        if warning:
            log.warning("%s", warning)
        if (identity := hook.uuid()) and not config.force_disable_caches:
            session.key = records.graph_key(identity, patches, gm, example_inputs)
        with session:
            return compile_fx(gm, example_inputs, config_patches={**patches, _HOOK: hook})

    def get_compiler_config(self) -> dict[str, Any]:
        from torch._inductor.compile_fx import get_patched_config_dict

        return dict(get_patched_config_dict(config_patches={}))

    def reset(self) -> None:
        from torch._inductor import config

        if config.triton.cudagraph_trees:
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()


def as_dynamo_error(backend: object, error: FusionError) -> FusionError:
    """The error in a class that is Dynamo's too, which Dynamo raises as it is: ``except BadConfig`` works."""
    from torch._dynamo.exc import BackendCompilerFailed

    kind = type(error)
    both = type(kind.__name__, (kind, BackendCompilerFailed), {"__module__": kind.__module__})
    raised: FusionError = both(backend, error, None)
    return raised.with_traceback(error.__traceback__)


class _Session:
    """One call of the backend: collects the reports of its graphs, fresh or from the cache.

    A backward graph is usually compiled long after the call has returned, when backward() first runs; its report is
    added then, and the record rewritten.

    Attributes:
        key: name of the record of the Dynamo graph; None when the compile caches are off, and so never hit.
    """

    def __init__(self, backend: FusionBackend, compile_id: str, index: records.SourceIndex) -> None:
        self.compile_id = compile_id
        self.key: str | None = None
        self._backend = backend
        self._index = index
        self._reports: list[GraphReport] = []
        self._open = False

    def add(self, report: GraphReport) -> None:
        """A graph was compiled."""
        if self._open:
            self._publish([report])
            return
        # What was known or assumed about this graph no longer holds.
        self._withdraw([r for r in self._reports if r.kind == report.kind and r.source != COMPILED])
        self._publish([report])
        self._store()

    def lookup(self) -> None:
        """A graph is looked for in Inductor's cache. If it is found, nothing more is heard of it."""
        from fusionpasses.pipeline import being_compiled

        kind = being_compiled()
        if not self._open and kind and all(r.kind != kind for r in self._reports):
            self._publish([GraphReport(self.compile_id, kind, CACHE_UNKNOWN)])
            self._store()

    def _publish(self, reports: list[GraphReport]) -> None:
        global _last_report
        self._reports += reports
        self._backend.report.graphs += reports
        _last_report = self._backend.report

    def _withdraw(self, reports: list[GraphReport]) -> None:
        for listed in (self._reports, self._backend.report.graphs):
            listed[:] = [r for r in listed if not any(r is w for w in reports)]

    def __enter__(self) -> None:
        self._open = True
        self._hits_before = _cache_hits()

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._open = False
        if error_type is not None:
            self._withdraw(list(self._reports))  # nothing that runs came of it
        elif _cache_hits() > self._hits_before:
            self._publish(self._from_cache())
            self._store()
        elif self._reports:
            self._store()
        else:
            # compile_fx returns early for a graph without calls; there was nothing to run a pass on.
            self._publish([GraphReport(self.compile_id, "empty", COMPILED)])

    def _from_cache(self) -> list[GraphReport]:
        stored = None if self.key is None else records.load(self.key, self._index, self.compile_id)
        if stored is None:
            return [GraphReport(self.compile_id, "cached", CACHE_UNKNOWN)]
        fresh = {r.kind for r in self._reports}
        return [r for r in stored if r.kind not in fresh]

    def _store(self) -> None:
        """Write the record, if this call has something new to say. It also says what is not known."""
        if self.key is not None and any(r.source == COMPILED for r in self._reports):
            records.store(self.key, self._reports, self._index)


def _cache_hits() -> int:
    """Graphs of this process that came from Inductor's or AOTAutograd's cache so far."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])


def fusion_backend(
    *called_by_dynamo: object, provider: str = "auto", passes: Sequence[str] | None = None, **misspelt: object
) -> FusionBackend:
    """A torch.compile backend that compiles with Inductor and the fusion passes.

    ``torch.compile(model, backend=fusion_backend(), mode=..., options=..., dynamic=..., fullgraph=...)`` take what
    they take with ``backend="inductor"``; a ``post_grad_custom_pre_pass`` of yours, in ``options`` or in
    ``torch._inductor.config``, runs before the fusion passes.

    Args:
        provider: who runs the fused ops: "auto" (the probes decide), "aiter" (AMD's kernels, for calls whose bytes they
            are proved to give; Triton for the others), "aiter_finite" (also where that holds for finite numbers only),
            "aiter_fast" (also where they keep float32 and the model rounds: other bytes), "triton" or "reference".
        passes: names of the passes to run; None runs all.

    Raises:
        BadConfig: a setting that does not exist. When compiling: an unknown mode or option, or one that would keep
            the passes from running (``mode="lite"``).
        ProviderUnavailable: ``provider`` was named and can run no op on this machine's GPUs; when compiling, it cannot
            run a fused op on the device that the model is on.
    """
    if called_by_dynamo:
        raise BadConfig(
            "fusion_backend: got a graph to compile, so it was handed to torch.compile itself; allowed is what it "
            "returns. Write backend=fusion_backend(), with parentheses"
        )
    if misspelt:
        name = next(iter(misspelt))
        raise BadConfig(
            f"fusion_backend: got {name}=, allowed 'provider' and 'passes'"
            f"{did_you_mean(name, ('provider', 'passes'))}; mode and options go to torch.compile"
        )
    config = FusionConfig(provider, passes)
    providers.require(provider)
    return FusionBackend(config, registered_anchors())


@functools.cache
def _default_backend(anchors: tuple[Anchor, ...]) -> FusionBackend:
    return FusionBackend(FusionConfig(), anchors)


def compile_fn(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Entry point of ``torch.compile(backend="fusionpasses")``. A function, because torch sets attributes on it."""
    return _default_backend(registered_anchors())(gm, example_inputs, **kwargs)
