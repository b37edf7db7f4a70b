"""capture(model): trace a model over one packed row of tokens with torch.export; no weight is materialised.

The traced function takes `input_ids [1, T]`, `position_ids [1, T]` and `cu_seqlens [S+1]`, and returns logits
`[1, T, V]`; T and S are symbolic. Parameters are replaced by fake ones while tracing, whatever device they are on (meta
for a model made from a config, real for a user's own module); buffers keep their values, and those outside the
checkpoint become constants of the graph.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from autodeploy.capture.expert_blocks import expert_blocks_replaced
from autodeploy.capture.experts import experts_hooked
from autodeploy.capture.gated_norms import gated_norms_recognised
from autodeploy.capture.hooks import Hooks, logits_of, model_arguments, packed_row
from autodeploy.capture.loops import Loops, tag_runs
from autodeploy.capture.matrix_memory import memories_recognised
from autodeploy.capture.mixers import mixers_recognised
from autodeploy.capture.probe import probed
from autodeploy.capture.repeated_layers import NotAlike, RepeatedLayers
from autodeploy.capture.write_out import require_closed, write_out
from autodeploy.checkpoint.recipe import Recipe, Source
from autodeploy.errors import AutoDeployError, CaptureError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.models.patches import patched

EXAMPLE_LENGTHS = [5, 9, 9]
"""lengths of the sequences packed into the example row; T and S are symbolic, so only 0 and 1 would be special

T is a prime number: a model that pads to a multiple of a block takes the branch that pads, which is right for any T.
"""

_DYNAMIC = ({1: Dim.AUTO}, {1: Dim.AUTO}, {0: Dim.AUTO}, {1: Dim.AUTO})
"""T and S are symbolic; a table of positions may bound T, and a length that is fixed altogether is refused by level"""


class _PackedRow(nn.Module):
    """The function that is traced: a model as a map from one packed row to logits."""

    def __init__(self, model: nn.Module, hooks: Hooks, layers: RepeatedLayers | None):
        super().__init__()
        self.model, self.hooks, self.layers = model, hooks, layers

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, hidden_states: Tensor | None = None
    ) -> Tensor:
        torch._check(input_ids.shape[1] == position_ids.shape[1])  # one symbol for T, from the first node on
        arguments = {}
        if hidden_states is not None:
            torch._check(input_ids.shape[1] == hidden_states.shape[1])
            arguments["hidden_states"] = hidden_states
        self.hooks.cu_seqlens, self.hooks.position_ids = cu_seqlens, position_ids
        self.hooks.num_tokens = input_ids.shape[1]
        if self.layers is not None:
            self.layers.begin()
        arguments |= model_arguments(self.model, self.hooks, position_ids)
        return logits_of(self.model(input_ids, **arguments))


def capture(
    model: nn.Module,
    *,
    name: str = "text",
    repeat_layers: bool = True,
    hidden_states: tuple[int, torch.dtype] | None = None,
) -> ModelGraph:
    """Trace a model into a graph at level CAPTURED.

    Args:
        model: maps token ids `[1, T]` to logits `[1, T, V]`, with `position_ids` as keyword if it takes any. Left as
            it was found.
        name: the graph's name in its program.
        repeat_layers: trace layers that are alike a few times only; the graph is the same.
        hidden_states: size and dtype of the `hidden_states` `[1, T, H]` that it takes as well, if it does.
    Raises:
        CaptureError: torch.export could not trace it; the message names the module and the line.
    """
    if not repeat_layers:
        return _capture(model, name, None, hidden_states)
    layers = RepeatedLayers(model)
    try:
        graph = _capture(model, name, layers, hidden_states)
        graph.repetition = layers.summary()
    except Exception as reason:  # an error is raised again by the full trace, which names its place in the model
        graph = _capture(model, name, None, hidden_states)
        graph.repetition = f"every layer was traced: {reason}"
    return graph


def _capture(
    model: nn.Module,
    name: str,
    layers: RepeatedLayers | None,
    hidden_states: tuple[int, torch.dtype] | None,
    lengths: list[int] = EXAMPLE_LENGTHS,
) -> ModelGraph:
    hooks = Hooks()
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    row = _PackedRow(model, hooks, layers)
    repeating = contextlib.nullcontext() if layers is None else layers.installed(hooks)
    with (
        patched(),
        _attributes_kept(model),
        experts_hooked(model),
        expert_blocks_replaced(model) as stacked,
        _fake_parameters(model, fake_mode),
        hooks.installed(model),
        probed(model),
        gated_norms_recognised(model),
        mixers_recognised(model),
        memories_recognised(model),
        Loops(hooks).installed(model),
        repeating,
        _quiet(),
    ):
        try:
            with fake_mode:
                inputs: tuple[Tensor, ...] = packed_row(lengths)
                if hidden_states is not None:
                    size, dtype = hidden_states
                    inputs = (*inputs, torch.zeros(1, sum(lengths), size, dtype=dtype))
            with torch.no_grad():
                dynamic = _DYNAMIC[: len(inputs)]
                exported = torch.export.export(row, inputs, dynamic_shapes=dynamic, strict=False)
                exported = _written_out(exported, layers)
        except NotAlike:
            raise
        except AutoDeployError as error:
            raise CaptureError(f"cannot capture {type(model).__name__}{_where(hooks)}: {error}") from error
        except Exception as error:
            raise CaptureError(_explain(model, hooks, error)) from error
    if hooks.most_chosen >= sum(lengths):  # a row so short that every token is chosen would limit the graph to such
        return _capture(model, name, layers, hidden_states, _past(hooks.most_chosen))
    graph = _to_graph(name, exported, stacked)
    graph.state_writes = dict(hooks.state_writes) if isinstance(model, PreTrainedModel) else None
    graph.max_length = _longest(graph)
    return graph


def _past(num_tokens: int) -> list[int]:
    """Lengths like the example's whose sum is a prime number beyond `num_tokens`."""
    total = num_tokens + sum(EXAMPLE_LENGTHS)
    while any(total % divisor == 0 for divisor in range(2, int(total**0.5) + 1)):
        total += 1
    return [*EXAMPLE_LENGTHS[:-1], total - sum(EXAMPLE_LENGTHS[:-1])]


def _written_out(exported: ExportedProgram, layers: RepeatedLayers | None) -> ExportedProgram:
    """The program without in-place updates, every layer in full."""
    if layers is not None:
        require_closed(exported, layers.calls)
    if any(_updates_in_place(node) for node in exported.graph.nodes):
        exported = exported.run_decompositions({})  # the same ops, each giving a new tensor
    if layers is not None:
        write_out(exported, layers.calls)
    return exported


def _updates_in_place(node: fx.Node) -> bool:
    """True for ATen's in-place ops; `detach_` of a constant made in forward updates nothing."""
    target = node.target
    is_mutable = isinstance(target, OpOverload) and target._schema.is_mutable
    return is_mutable and target != torch.ops.aten.detach_.default


def _longest(graph: ModelGraph) -> int | None:
    """The longest sequence the traced code allows, such as the size of a table of positions; None when unbounded."""
    input_ids = graph.input("input_ids")
    length = None if input_ids is None else input_ids.meta["val"].shape[1]
    if not isinstance(length, torch.SymInt) or not length.node.expr.free_symbols:
        return None
    upper = length.node.shape_env.var_to_range[length.node.expr].upper
    return int(upper) if upper.is_Integer and int(upper) < 2**31 else None


def _where(hooks: Hooks) -> str:
    return f" in module {hooks.active_modules[-1]}" if hooks.active_modules else ""


def _explain(model: nn.Module, hooks: Hooks, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    summary = " ".join(lines[:3])[:600] or type(error).__name__
    line = next((entry for entry in lines if entry.startswith("File ") and "/torch/" not in entry), "")
    return (
        f"cannot capture {type(model).__name__}{_where(hooks)}: {type(error).__name__}: {summary} {line}\n"
        "The model's code there does something torch.export cannot trace, such as Python control flow on tensor values."
        " Rewrite that part without it, or wrap it in a torch.library custom op with a cached twin"
        " (docs/adding-an-op.md)."
    )


@contextlib.contextmanager
def _fake_parameters(model: nn.Module, fake_mode: FakeTensorMode) -> Iterator[None]:
    """Replace every parameter by a fake one of its shape and dtype; tied parameters stay tied. Undone on leaving."""
    fakes: dict[int, nn.Parameter] = {}
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                with fake_mode:
                    value = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fakes[id(parameter)] = nn.Parameter(value, requires_grad=False)
            before.append((module, name, parameter))
    for module, name, parameter in before:
        module._parameters[name] = fakes[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Some modules keep state of a run on themselves; what tracing leaves there is taken away again."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs whole graphs on failure; the error carries what a user needs."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export copies its own deprecated tree specs
            # State that a model leaves on its modules is taken away again when the capture ends.
            warnings.filterwarnings("ignore", message=".*were assigned during export", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _to_graph(name: str, exported: ExportedProgram, recipes: Mapping[str, Recipe]) -> ModelGraph:
    """An exported program as a graph: parameters as recipes, other tensors as constants, one output.

    `recipes` are those of parameters that are none of the model's own.
    """
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT and not _prepares_weight(exported, spec):
            raise CaptureError(
                f"the model updates its own buffer {spec.target!r} while it runs; state must live in a cache"
                " (docs/adding-an-op.md)"
            )
    module = fx.GraphModule({}, _renamed(exported.graph_module.graph))
    _adopt_submodules(module, exported.graph_module)
    weights: dict[str, Recipe] = {}
    nodes = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            node.target = spec.arg.name
            continue
        target = str(spec.target)
        attribute = target.removeprefix("model.").replace(".", "_")
        value = exported.state_dict.get(target) if spec.kind != InputKind.CONSTANT_TENSOR else None
        if value is None:
            module.register_buffer(attribute, exported.constants[target], persistent=False)
        else:
            own = target.removeprefix("model.")
            weights[attribute] = recipes.get(own, Source(own, tuple(value.shape), value.dtype))
            meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
            module.register_parameter(attribute, nn.Parameter(meta, requires_grad=False))
        with module.graph.inserting_before(node):
            attribute_node = module.graph.get_attr(attribute)
        attribute_node.meta = dict(node.meta)
        node.replace_all_uses_with(attribute_node)
        module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if node.target == torch.ops.aten.detach_.default:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target == torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # a rewrite may change strides; shapes are what is meant
    kinds = [spec.kind for spec in signature.output_specs]
    _single_output(module.graph, kinds.index(OutputKind.USER_OUTPUT))
    tag_runs(module.graph)
    input_ids = next(node for node in module.graph.nodes if node.op == "placeholder")
    graph = ModelGraph(name, module, input_ids.meta["val"].fake_mode, weights)
    graph.clean()
    return graph


def _renamed(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes are numbered in order, so that a graph's text does not tell how it was made."""
    copy, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        name = re.sub(r"(_\d+)+$", "", node.name) if node.op == "call_function" else node.name
        args, kwargs = fx.map_arg((node.args, node.kwargs), nodes.__getitem__)
        nodes[node] = copy.create_node(node.op, node.target, args, kwargs, name)
        nodes[node].meta = node.meta
    return copy


def _prepares_weight(exported: ExportedProgram, spec: OutputSpec) -> bool:
    """True for a parameter changed in forward by a function of itself alone, as rescaling before the first step does.

    The graph computes the changed value from the stored one wherever it is used, so nothing has to be written back.
    """
    if spec.target not in exported.graph_signature.parameters:
        return False
    inputs = set(exported.graph_signature.user_inputs)
    pending = [node for node in exported.graph.nodes if node.name == spec.arg.name]
    while pending:
        node = pending.pop()
        if node.name in inputs:
            return False
        pending.extend(node.all_input_nodes)
    return True


def _adopt_submodules(module: fx.GraphModule, source: fx.GraphModule) -> None:
    """Graphs inside the graph (autocast and grad-mode regions) come along."""
    for child, submodule in source.named_children():
        module.add_module(child, submodule)


def _single_output(graph: fx.Graph, index: int) -> None:
    output = graph.output_node()
    (values,) = output.args
    if isinstance(values, tuple | list):
        output.args = (values[index],)
