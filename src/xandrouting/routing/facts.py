"""From what lies on disk to what an adapter may know of it."""

from __future__ import annotations

from xandrouting.engines.base import ModelFacts, StateFacts
from xandrouting.inventory.gguf import GgufHeader
from xandrouting.inventory.model_file import FolderModel, ModelFile


def facts_of(file: ModelFile) -> ModelFacts:
    """Return what an adapter may know of a model."""
    if file.safetensors is not None:
        return _of_folder(file.size_bytes, file.safetensors)
    header = file.header
    if header is None:
        return ModelFacts(file.size_bytes)
    return ModelFacts(
        file.size_bytes,
        context_length=header.context_length,
        layers=header.block_count,
        pooling=bool(header.pooling_type),
        architecture=header.architecture,
        embedding_length=header.embedding_length,
        feed_forward=_feed_forward(header),
        vocab_size=header.vocab_size,
        head_count=header.head_count,
        head_count_kv=header.head_count_kv,
        key_length=header.key_length,
        value_length=header.value_length,
        key_length_swa=header.key_length_swa,
        value_length_swa=header.value_length_swa,
        keys_only=header.key_length_mla is not None,
        sliding_window=header.sliding_window,
        sliding_pattern=header.sliding_window_pattern,
        state=_state(header),
        recurrent_pattern=header.recurrent_layers,
        uncached_layers=(header.shared_kv_layers or 0) + (header.nextn_predict_layers or 0),
        tensor_bytes=header.tensor_bytes,
        type_bytes=header.type_bytes,
        block_bytes=header.block_bytes,
        embedding_bytes=header.embedding_bytes,
        embedding_type=header.embedding_type,
        output_bytes=header.output_bytes,
        mmproj_bytes=file.mmproj_bytes,
    )


def _of_folder(size_bytes: int, model: FolderModel) -> ModelFacts:
    shape = model.shape
    full, sliding = shape.attention_layers
    return ModelFacts(
        size_bytes,
        context_length=shape.max_position_embeddings,
        stretches=shape.stretches,
        layers=shape.num_hidden_layers,
        pooling=model.pooling,
        architecture=shape.architectures[0] if shape.architectures else None,
        embedding_length=shape.hidden_size,
        feed_forward=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        head_count=shape.num_attention_heads,
        kv_values=shape.kv_values,
        full_layers=full,
        sliding_layers=sliding,
        sliding_window=shape.sliding_window,
        tensor_bytes=shape.weight_bytes,
        type_bytes=shape.type_bytes,
        chat_template=model.chat_template,
    )


def _feed_forward(header: GgufHeader) -> int:
    """Return how wide the layers are that work on one token, the widest of all."""
    expert = _widest(header.expert_feed_forward_length) * _widest(header.expert_used_count)
    shared = header.expert_shared_feed_forward_length or 0
    return max(_widest(header.feed_forward_length), expert + shared)


def _widest(number: int | tuple[int, ...] | None) -> int:
    return max(number, default=0) if isinstance(number, tuple) else number or 0


def _state(header: GgufHeader) -> StateFacts | None:
    if not header.ssm_state_size or not header.ssm_inner_size:
        return None
    return StateFacts(
        conv_kernel=header.ssm_conv_kernel or 0,
        inner_size=header.ssm_inner_size,
        state_size=header.ssm_state_size,
        group_count=header.ssm_group_count or 0,
    )
