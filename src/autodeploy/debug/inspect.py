"""inspect: the graph of a model at any level, as text, without reading its weights."""

from torch import nn

from autodeploy.build import resolve_device
from autodeploy.capture.export import capture
from autodeploy.config import Options
from autodeploy.errors import ConfigError
from autodeploy.graph.levels import Level
from autodeploy.graph.text import graph_text as text_of
from autodeploy.graph.verify import verify
from autodeploy.models.instantiate import instantiate
from autodeploy.models.resolve import resolve_model
from autodeploy.transforms.pipeline import configure, default_pipeline, kernel_choice


def graph_text(model: str | nn.Module, level: str, options: Options | None = None) -> str:
    """One line per node of the model's graph at a level (`captured`, `canonical`, `cached`, `lowered`).

    Raises:
        ConfigError: no such level. UnsupportedModelError: the level cannot be reached.
    """
    options = options or Options()
    names = [step.name.lower() for step in Level]
    if level.lower() not in names:
        raise ConfigError(f"level must be one of {', '.join(names)}; got {level!r}")
    wanted = Level[level.upper()]
    if isinstance(model, str):
        resolved = resolve_model(model, options.model)
        remote = options.model.trust_remote_code
        model = instantiate(resolved.config, dtype=resolved.dtype, trust_remote_code=remote)
    graph = capture(model)
    verify(graph, Level.CAPTURED)
    device = resolve_device(options.compile.device)
    pipeline = configure(default_pipeline(device, kernel_choice(device, options.compile)), options.compile)
    for stage in pipeline.stages:
        if stage.ensures is None or stage.ensures <= wanted:
            list(stage.run(graph, strict=options.compile.strict))
    return text_of(graph)
