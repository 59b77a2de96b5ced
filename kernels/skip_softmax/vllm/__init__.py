"""The plug-in for vLLM, which serves a thresholds file as the attention backend CUSTOM.

    vllm serve MODEL --attention-backend CUSTOM \
        --additional-config '{"skip_softmax": {"thresholds": "thresholds.yaml"}}'

vLLM calls `register` in every process, for the entry point `skip_softmax` of `vllm.general_plugins`.
"""


def register() -> None:
    """Makes the backend known to vLLM under the name CUSTOM; may be called again."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from skip_softmax.vllm import metrics

    metrics.offer()
    register_backend(AttentionBackendEnum.CUSTOM, "skip_softmax.vllm.backend.SkipSoftmaxBackend")
