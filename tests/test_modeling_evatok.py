"""The tokenizer: two ways that agree, causality, independence of clips, files, gradients, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import evatok_hf
from evatok_hf import EvatokConfig, EvatokModel, EvatokVideoProcessor, VideoTokens, open_video
from evatok_hf.modeling_evatok import TokenLayout, patchify, pooling_matrix, sincos_positions, unpatchify

BIKES = Path(evatok_hf.__file__).parent / "assets" / "bikes.mp4"
MIXED = [[2, 4, 8, 16], [32, 2, 16, 4], [8, 8, 32, 2]]
# Weights far larger than at the start of training, so that attention is sharp and every path leaves its mark.
TINY = {
    "image_size": 32,
    "block_lengths": (2, 4, 8, 16, 32),
    "codebook_size": 64,
    "embed_dim": 32,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "decoder_hidden_size": 48,
    "decoder_num_layers": 2,
    "decoder_num_heads": 2,
    "initializer_range": 0.25,
}


def make(seed: int = 0, **fields) -> EvatokModel:
    torch.manual_seed(seed)
    return EvatokModel(EvatokConfig(**{**TINY, **fields})).eval()


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    """Three consecutive real clips, (3, 16, 3, 32, 32) in [-1, 1]."""
    processor = EvatokVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with open_video(BIKES) as video:
        frames = video.read(range(48))
    return processor(list(frames.reshape(3, 16, *frames.shape[1:])), return_tensors="pt").pixel_values_videos


@pytest.fixture(scope="module", params=["learned", "pooled"])
def position(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, position) -> EvatokModel:
    return make(position_embedding=position, attn_implementation=request.param)


@pytest.fixture(scope="module")
def plain() -> EvatokModel:
    return make(position_embedding="pooled")


def ids_of(tokens: VideoTokens, clip: int, block: int) -> torch.Tensor:
    one = tokens.clip(clip)
    return one.ids.split(one.lengths[0].tolist())[block]


# --- pure functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [1, 2, 4, 16])
def test_pooling_rows_go_from_the_mean_to_single_cells(grid):
    matrix = pooling_matrix(grid)
    cells = grid * grid
    assert matrix.shape == (2 * cells, cells)
    assert torch.allclose(matrix.sum(1), torch.ones(2 * cells))
    assert torch.allclose(matrix[:2], torch.full((2, cells), 1 / cells))
    assert torch.equal(matrix[-cells:], torch.eye(cells))


def test_pooling_prefixes_are_whole_levels_each_inside_the_one_before():
    matrix, start, coarser = pooling_matrix(4), 1, None
    for count in (1, 2, 4, 8, 16):  # 1 + 1 + 2 + 4 + 8 + 16: every candidate 2, 4, .. 32 ends with a level
        level = matrix[start : start + count] > 0
        assert (level.sum(0) == 1).all() and (level.sum(1) == 16 // count).all()  # a partition into equal cells
        if coarser is not None:
            assert all(any((row <= parent).all() for parent in coarser) for row in level)
        start, coarser = start + count, level
    left_then_right = matrix[2:4].view(2, 4, 4) > 0
    assert left_then_right[0, :, :2].all() and left_then_right[1, :, 2:].all()


def test_patchify_keeps_blocks_and_cells_apart_and_unpatchify_undoes_it():
    video = torch.randn(2, 16, 3, 32, 32)
    patches = patchify(video, num_blocks=4, patch_size=8)
    assert patches.shape == (2, 4, 16, 3 * 4 * 8 * 8)
    assert torch.equal(unpatchify(patches, frames_per_block=4, patch_size=8, channels=3), video)
    changed = video.clone()
    changed[0, 5, :, 9, 26] += 1  # block 1, second row and last column of cells
    where = (patchify(changed, 4, 8) != patches).any(-1).nonzero().tolist()
    assert where == [[0, 1, 7]]


def test_fixed_positions_tell_all_cells_apart():
    positions = sincos_positions(num_blocks=4, grid_size=4, dim=32).flatten(0, 1)
    assert positions.shape == (64, 32)
    assert (torch.cdist(positions, positions) + 10 * torch.eye(64)).min() > 0.1


def test_layout_of_packed_tokens():
    layout = TokenLayout.from_lengths(torch.tensor([[1, 2], [3, 1]]))
    assert layout.block.tolist() == [[0, 1, 1, 2], [0, 0, 0, 1]]
    assert layout.slot.tolist() == [[0, 0, 1, 0], [0, 1, 2, 0]]
    assert layout.starts.tolist() == [[0, 1], [0, 3]]
    assert layout.valid.tolist() == [[True, True, True, False], [True] * 4]
    assert layout.sees(torch.tensor([[0], [1]])).squeeze().tolist() == [[True, False, False, False], [True] * 4]


# --- encode and decode ------------------------------------------------------------------------------------------------


def test_the_dense_and_the_block_by_block_way_agree(model, clips):
    dense = model(clips, MIXED)
    tokens = model.encode(clips, MIXED)
    assert torch.equal(tokens.ids, dense.ids)
    assert tokens.lengths.tolist() == dense.lengths.tolist() == MIXED
    assert tokens.ids.unique().numel() > 8  # the comparison is not of one constant
    video = model.decode(tokens)
    assert video.shape == dense.reconstruction.shape == clips.shape
    assert torch.allclose(video, dense.reconstruction.clamp(-1, 1), atol=2e-4)
    assert dense.reconstruction.std() > 0.05


def test_eager_and_sdpa_attention_agree(position, clips):
    eager, sdpa = (make(position_embedding=position, attn_implementation=name) for name in ("eager", "sdpa"))
    tokens = eager.encode(clips, MIXED)
    assert torch.equal(tokens.ids, sdpa.encode(clips, MIXED).ids)
    assert torch.allclose(eager.decode(tokens), sdpa.decode(tokens), atol=2e-4)
    a, b = eager(clips, MIXED), sdpa(clips, MIXED)
    assert torch.allclose(a.reconstruction, b.reconstruction, atol=2e-4)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-4)


def test_all_625_assignments_give_as_many_ids_as_they_say(clips):
    model = make(encoder_num_layers=1, decoder_num_layers=1)
    assignments = model.assignment_space.all()
    tokens = model.encode(clips[:1].expand(625, -1, -1, -1, -1), assignments)
    assert torch.equal(tokens.lengths, assignments) and tokens.ids.numel() == int(assignments.sum())
    assert int(tokens.ids.min()) >= 0 and int(tokens.ids.max()) < 64
    # Causality, exhaustively: the ids of a block follow from the lengths up to it, the later ones do not matter.
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    rows = tokens.ids.split(assignments.sum(-1).tolist())
    for lengths, row in zip(assignments.tolist(), rows, strict=True):
        for t, block in enumerate(row.split(lengths)):
            assert len(block) == lengths[t]
            assert torch.equal(seen.setdefault(tuple(lengths[: t + 1]), block), block)
    assert len(seen) == 5 + 25 + 125 + 625


def test_every_single_assignment_decodes(clips):
    model = make(encoder_num_layers=1, decoder_num_layers=1)
    for lengths in model.assignment_space.all()[::89].tolist():
        tokens = model.encode(clips[:1], lengths)
        video = model.decode(tokens)
        assert video.shape == (1, 16, 3, 32, 32) and torch.isfinite(video).all()
        assert video.min() >= -1 and video.max() <= 1


def test_a_clips_ids_and_frames_do_not_depend_on_the_batch(model, clips):
    together = model.encode(clips, MIXED)
    other_lengths = model.encode(clips, [MIXED[0], [2] * 4, [32] * 4])
    frames = model.decode(together)
    for index in range(3):
        alone = model.encode(clips[index : index + 1], MIXED[index])
        assert torch.equal(alone.ids, together.clip(index).ids)
        assert torch.equal(model.decode(alone)[0], frames[index])
    assert torch.equal(other_lengths.clip(0).ids, together.clip(0).ids)
    turned = model.encode(clips.flip(0), MIXED[::-1])
    assert torch.equal(turned.clip(2).ids, together.clip(0).ids)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_later_frames_do_not_change_earlier_blocks(model, clips, block):
    changed = clips[:1].clone()
    changed[:, 4 * block :] = clips[1:2, 4 * block :].flip(-1)
    before, after = model.encode(clips[:1], 16), model.encode(changed, 16)
    for t in range(block):
        assert torch.equal(ids_of(before, 0, t), ids_of(after, 0, t))
    assert not torch.equal(ids_of(before, 0, block), ids_of(after, 0, block))
    frames = [model.decode(tokens) for tokens in (before, after)]
    assert torch.equal(frames[0][:, : 4 * block], frames[1][:, : 4 * block])
    assert not torch.equal(frames[0][:, 4 * block :], frames[1][:, 4 * block :])
    dense = [model(video, 16).reconstruction for video in (clips[:1], changed)]
    assert torch.allclose(dense[0][:, : 4 * block], dense[1][:, : 4 * block], atol=2e-4)


def test_later_lengths_do_not_change_earlier_blocks(model, clips):
    short, long = [8, 4, 2, 2], [8, 4, 32, 16]
    a, b = model.encode(clips[:1], short), model.encode(clips[:1], long)
    assert torch.equal(a.ids[:12], b.ids[:12])
    assert torch.equal(model.decode(a)[:, :8], model.decode(b)[:, :8])
    dense = [model(clips[:1], lengths) for lengths in (short, long)]
    assert torch.equal(dense[0].ids[:12], dense[1].ids[:12])
    assert torch.allclose(dense[0].reconstruction[:, :8], dense[1].reconstruction[:, :8], atol=2e-4)


def test_earlier_blocks_do_inform_later_ones(model, clips):
    changed = clips[:1].clone()
    changed[:, :4] = clips[1:2, :4].flip(-1)
    before, after = model.encode(clips[:1], 32), model.encode(changed, 32)
    assert not torch.equal(ids_of(before, 0, 3), ids_of(after, 0, 3))
    first_changed = VideoTokens((before.ids + (torch.arange(128) < 32)) % 64, before.lengths)
    assert not torch.equal(model.decode(before)[:, 12:], model.decode(first_changed)[:, 12:])


def test_every_token_reaches_the_frames_of_its_block(plain, clips):
    tokens = plain.encode(clips[:1], [2, 4, 8, 2])
    frames = plain.decode(tokens)
    for index, block in enumerate([0] * 2 + [1] * 4 + [2] * 8 + [3] * 2):
        ids = tokens.ids.clone()
        ids[index] = (ids[index] + 1) % 64
        changed = plain.decode(VideoTokens(ids, tokens.lengths))
        assert not torch.equal(changed[:, 4 * block : 4 * block + 4], frames[:, 4 * block : 4 * block + 4])


def test_the_same_input_gives_the_same_output(model, clips):
    first, second = (model.encode(clips, MIXED) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(model.decode(first), model.decode(second))
    assert torch.equal(model(clips, MIXED).loss, model(clips, MIXED).loss)


def test_lengths_default_to_the_middle_candidate_and_may_be_one_row(plain, clips):
    assert plain.encode(clips).lengths.tolist() == [[8] * 4] * 3
    assert plain(clips).lengths.tolist() == [[8] * 4] * 3
    assert plain.encode(clips, [2, 4, 8, 16]).lengths.tolist() == [[2, 4, 8, 16]] * 3


def test_tokens_say_where_they_come_from(plain, clips, tmp_path):
    tokens = plain.encode(clips[:1])
    assert (tokens.height, tokens.width, tokens.fingerprint) == (32, 32, plain.fingerprint())
    plain.save_pretrained(tmp_path / "my-tokenizer")
    assert EvatokModel.from_pretrained(tmp_path / "my-tokenizer").encode(clips[:1]).checkpoint == "my-tokenizer"


def test_no_clips_give_no_tokens(plain):
    tokens = plain.encode(torch.empty(0, 16, 3, 32, 32))
    assert len(tokens) == 0 and tokens.ids.shape == (0,) and tokens.lengths.shape == (0, 4)
    assert plain.decode(tokens).shape == (0, 16, 3, 32, 32)


def test_encode_and_decode_leave_no_graph_and_run_in_inference_mode(plain, clips):
    tokens = plain.encode(clips[:1].clone().requires_grad_(), 8)
    assert not plain.decode(tokens).requires_grad
    with torch.inference_mode():
        again = plain.encode(clips[:1], 8)
        assert torch.equal(plain.decode(again), plain.decode(tokens))
    assert torch.equal(again.ids, tokens.ids)


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(16, 3, 32, 32),
        torch.zeros(1, 15, 3, 32, 32),
        torch.zeros(1, 3, 16, 32, 32),
        torch.zeros(1, 16, 3, 32, 64),
        torch.zeros(1, 16, 1, 32, 32),
    ],
    ids=["no batch", "frames", "channels first", "size", "grey"],
)
def test_videos_of_a_wrong_shape_are_refused(plain, video):
    for way in (plain.encode, plain.forward):
        with pytest.raises(ValueError, match=r"must have shape \(clips, 16, 3, 32, 32\), got .*EvatokVideoProcessor"):
            way(video)


def test_videos_that_are_no_float_tensor_are_refused(plain):
    for video in (torch.zeros(1, 16, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 16, 3, 32, 32).numpy()):
        with pytest.raises(ValueError, match="must be .*float"):
            plain.encode(video)


def test_lengths_outside_the_candidates_are_refused(plain, clips):
    for way in (plain.encode, plain.forward):
        with pytest.raises(ValueError, match=r"\[3\] are not among the candidates; use \[2, 4, 8, 16, 32\]"):
            way(clips, [2, 2, 2, 3])
        with pytest.raises(ValueError, match="2 rows for 3 clips"):
            way(clips, MIXED[:2])


def test_tokens_of_another_checkpoint_are_refused_by_name(plain, clips):
    tokens = plain.encode(clips[:1])
    tokens.checkpoint = "the-first-one"
    other = make(seed=1)
    assert other.fingerprint() != plain.fingerprint()
    with pytest.raises(ValueError, match="the-first-one") as caught:
        other.decode(tokens)
    assert tokens.fingerprint in str(caught.value) and other.fingerprint() in str(caught.value)
    tokens.fingerprint = None  # a generator need not know
    assert other.decode(tokens).shape == (1, 16, 3, 32, 32)


@pytest.mark.parametrize("wrong", [-1, 64])
def test_ids_outside_the_codebook_are_refused(plain, wrong):
    ids = torch.zeros(8, dtype=torch.int64)
    ids[3] = wrong
    with pytest.raises(ValueError, match="codebook has 64 entries"):
        plain.decode(VideoTokens(ids, torch.full((1, 4), 2)))


def test_token_counts_that_are_no_assignment_are_refused(plain):
    with pytest.raises(ValueError, match=r"\[3\] are not among the candidates"):
        plain.decode(VideoTokens(torch.zeros(9, dtype=torch.int64), torch.tensor([[2, 2, 2, 3]])))
    with pytest.raises(ValueError, match="4 temporal blocks"):
        plain.decode(VideoTokens(torch.zeros(6, dtype=torch.int64), torch.tensor([[2, 2, 2]])))


# --- fingerprint ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_the_fingerprint_follows_training(clips, fused):
    model = make(encoder_num_layers=1, decoder_num_layers=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    before = model.fingerprint()
    assert model.fingerprint() == before
    model(clips[:1]).loss.backward()
    optimizer.step()
    assert model.eval().fingerprint() != before


def test_the_fingerprint_follows_loaded_weights(plain):
    model = make(seed=1, position_embedding="pooled")
    assert model.fingerprint() != plain.fingerprint()
    for assign in (True, False):
        other = make(seed=2, position_embedding="pooled")
        other.fingerprint()
        other.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()}, assign=assign)
        assert other.fingerprint() == plain.fingerprint()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(position, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make(position_embedding=position).save_pretrained(path)
    return path


def assert_same_model(a: EvatokModel, b: EvatokModel, clips: torch.Tensor) -> None:
    mine, other = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (a, b))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert a.fingerprint() == b.fingerprint()
    tokens = a.encode(clips, MIXED)
    assert torch.equal(tokens.ids, b.encode(clips, MIXED).ids)
    assert torch.equal(a.decode(tokens), b.decode(tokens))


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_a_saved_model_loads_equal(position, folder, clips, device_map):
    loaded = EvatokModel.from_pretrained(folder, device_map=device_map)
    assert not loaded.training
    assert_same_model(make(position_embedding=position), loaded.to("cpu"), clips)


def test_a_checkpoint_holds_no_buffers_that_can_be_computed(folder):
    assert not [name for name in load_file(folder / "model.safetensors") if "pool" in name or "cell" in name] or (
        "learned" in (folder / "config.json").read_text()
    )


def test_a_sharded_checkpoint_loads_equal(plain, clips, tmp_path):
    plain.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_model(plain, EvatokModel.from_pretrained(tmp_path), clips)


def test_attention_can_be_chosen_on_loading(folder, clips):
    eager, sdpa = (EvatokModel.from_pretrained(folder, attn_implementation=name) for name in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    tokens = eager.encode(clips, MIXED)
    assert torch.equal(tokens.ids, sdpa.encode(clips, MIXED).ids)
    assert torch.allclose(eager.decode(tokens), sdpa.decode(tokens), atol=2e-4)


def test_a_bfloat16_checkpoint_has_one_fingerprint_in_either_precision(position, folder, clips, tmp_path):
    EvatokModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    own = EvatokModel.from_pretrained(tmp_path)
    wide = EvatokModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert (own.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert own.fingerprint() == wide.fingerprint() == EvatokModel.from_pretrained(folder).fingerprint()
    # What the file does not hold is filled in either precision.
    for name, buffer in make(position_embedding=position).named_buffers():
        assert torch.equal(own.get_buffer(name), buffer.bfloat16()), name
        assert torch.equal(wide.get_buffer(name), buffer), name
    tokens = wide.encode(clips, MIXED)
    narrow = own.encode(clips, MIXED)
    assert (narrow.ids == tokens.ids).float().mean() > 0.5
    assert (own.decode(tokens).float() - wide.decode(tokens)).abs().mean() < 0.05


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_checkpoint_with_other_weights_than_the_model_is_refused_by_name(folder, tmp_path, change):
    weights = load_file(folder / "model.safetensors")
    name = "decoder.layers.1.cross_attention.v_proj.weight"
    weights["surprise.weight"] = weights.pop(name)
    if change == "unexpected":
        weights[name] = weights["surprise.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="surprise.weight" if change == "unexpected" else name) as caught:
        EvatokModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_loading_info_can_still_be_had(folder):
    loaded, info = EvatokModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, EvatokModel) and not info["missing_keys"] and not info["unexpected_keys"]


def test_a_checkpoint_of_other_sizes_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "codebook_size": 65}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        EvatokModel.from_pretrained(tmp_path)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_its_parts(plain, clips):
    out = plain(clips, MIXED)
    expected = out.reconstruction_loss + out.codebook_loss + 0.25 * out.commitment_loss + 0.02 * out.entropy_loss
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.reconstruction_loss.item() == pytest.approx(F.l1_loss(out.reconstruction, clips).item(), rel=1e-6)
    heavier = make(position_embedding="pooled", commitment_weight=2.0, entropy_weight=0.5)(clips, MIXED)
    expected = out.reconstruction_loss + out.codebook_loss + 2 * out.commitment_loss + 0.5 * out.entropy_loss
    assert heavier.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def gradients(model: EvatokModel, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(clips[:2], [[2, 4, 8, 16], [32] * 4]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_reaches_every_parameter(model, clips):
    grads = gradients(model, clips)
    assert not [name for name, grad in grads.items() if grad is None or not torch.isfinite(grad).all()]
    # A bias of the keys adds the same to all scores of a query, so that softmax takes it away again.
    assert not [name for name, grad in grads.items() if not grad.any() and not name.endswith("k_proj.bias")]
    for name, grad in grads.items():
        if name.endswith(("token_table", "cell_table", "index_embedding")) or name == "quantizer.weight":
            assert grad.flatten(0, -2).abs().sum(-1).min() > 0, f"a row of {name} gets no gradient"


def test_gradient_checkpointing_changes_no_gradient_and_no_ids(position, clips):
    model = make(position_embedding=position).train()
    expected, ids = gradients(model, clips), model.encode(clips, MIXED).ids
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for name, grad in gradients(model, clips).items():
        assert torch.allclose(grad, expected[name], rtol=1e-4, atol=1e-6), name
    assert torch.equal(model.encode(clips, MIXED).ids, ids)


def test_training_learns_a_clip(clips):
    model = make(position_embedding="pooled", initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        out = model(clips[:1], 8)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.reconstruction_loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_autocast_trains_with_the_same_codes_arithmetic(plain, clips):
    with torch.autocast("cpu", torch.bfloat16):
        out = plain(clips, MIXED)
    assert torch.isfinite(out.loss) and out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(plain(clips, MIXED).loss.item(), rel=0.1)


def test_blending_lets_the_decoder_see_features_before_codes(plain, clips):
    blended, quantized = (plain(clips, MIXED, quantization_blend=blend) for blend in (0.0, 1.0))
    assert torch.equal(blended.ids, quantized.ids)
    assert not torch.allclose(blended.reconstruction, quantized.reconstruction, atol=1e-3)


def test_a_tuple_on_request(plain, clips):
    named = plain(clips, MIXED)
    values = plain(clips, MIXED, return_dict=False)
    assert isinstance(values, tuple) and len(values) == len(named.keys()) == 8
    for name, value in zip(named.keys(), values, strict=True):
        assert torch.equal(named[name], value), name


def test_the_decoders_hidden_states(plain, clips):
    assert plain(clips, MIXED).decoder_hidden_states is None
    out = plain(clips, MIXED, output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in out.decoder_hidden_states] == [(3, 4, 16, 48)] * 3
    frames = plain.decoder.head(out.decoder_hidden_states[-1])
    assert torch.equal(frames, out.reconstruction)


def test_more_than_65536_tokens_in_one_step():
    model = make(
        image_size=64,
        block_lengths=(128,),
        codebook_size=8,
        num_blocks=4,
        num_frames=4,
        encoder_num_layers=1,
        decoder_num_layers=1,
        encoder_hidden_size=16,
        decoder_hidden_size=16,
        embed_dim=8,
        encoder_num_heads=1,
        decoder_num_heads=1,
        mlp_ratio=1,
    )
    video = torch.rand(129, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = model(video)
    out.loss.backward()
    assert out.ids.numel() == 129 * 512 > 65_536
    assert torch.isfinite(model.quantizer.weight.grad).all()
    assert torch.equal(model.encode(video[-1:]).ids, out.ids[-512:])
