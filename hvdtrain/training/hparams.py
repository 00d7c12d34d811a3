"""The options of a run as TensorBoard's hparams plug-in reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2


def build_hparams(options: Mapping[str, object], metrics: Sequence[str]) -> Summary:
    """Return the summary that shows options next to metrics in the tab "hparams".

    Args:
        options: by their names, nested ones too.
        metrics: tags of scalars.
    """
    values = dict(iterate_options(options, ""))
    infos = [api_pb2.HParamInfo(name=name, type=find_data_type(value)) for name, value in values.items()]
    columns = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
    experiment = plugin_data_pb2.HParamsPluginData(
        version=metadata.PLUGIN_DATA_VERSION,
        experiment=api_pb2.Experiment(hparam_infos=infos, metric_infos=columns),
    )
    start = plugin_data_pb2.SessionStartInfo()
    for name, value in values.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    session = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, session_start_info=start)
    return Summary(
        value=[
            wrap_data(metadata.EXPERIMENT_TAG, experiment),
            wrap_data(metadata.SESSION_START_INFO_TAG, session),
        ]
    )


def iterate_options(options: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    """Yield the options that have a value, those of nested objects as "adam.beta"."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from iterate_options(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def find_data_type(value: object) -> int:
    """Return the plug-in's type of a value."""
    if isinstance(value, bool):
        return int(api_pb2.DATA_TYPE_BOOL)
    return int(api_pb2.DATA_TYPE_FLOAT64 if isinstance(value, (int, float)) else api_pb2.DATA_TYPE_STRING)


def wrap_data(tag: str, content: plugin_data_pb2.HParamsPluginData) -> Summary.Value:
    """Return the plug-in's data as a value of a summary."""
    data = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=data))
