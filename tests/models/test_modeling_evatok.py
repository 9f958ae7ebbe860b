"""The tokenizer: two ways that agree, causality, independence of clips, and mistakes."""

from __future__ import annotations

import pytest
import torch
from tokenizer_samples import MIXED, make_tokenizer, real_clips, real_frames
from torch.nn import functional as F
from transformers.utils import ModelOutput

from evatok_hf import EvatokConfig, EvatokModel, EvatokVideoProcessor, VideoTokenizer, VideoTokens, bundled_checkpoints
from evatok_hf.models.modeling_evatok import (
    HEAD_OFFSETS,
    PaddedLayout,
    cosine_transform,
    interlaced_places,
    patch_spectrum,
    patchify,
    pooling_matrix,
    position_shift,
    resize,
    sincos_positions,
    unpatchify,
)


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return real_clips()


@pytest.fixture(scope="module", params=["learned", "pooled"])
def position(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, position) -> EvatokModel:
    return make_tokenizer(position_embedding=position, attn_implementation=request.param)


@pytest.fixture(scope="module")
def plain() -> EvatokModel:
    return make_tokenizer(position_embedding="pooled")


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


def test_interlaced_queries_sit_on_cells_that_they_pool_and_spread_over_all_cells():
    pooled = pooling_matrix(8)
    blocks = [interlaced_places(8, t) for t in range(4)]
    for places in blocks:
        assert (pooled[torch.arange(128), places] > 0).all()
        assert len(places[:8].unique()) == 8 and len(places[:32].unique()) >= 30
        assert torch.equal(places[-64:], torch.arange(64))
    assert len(torch.cat([places[:32] for places in blocks]).unique()) == 64  # together 32 tokens a block leave no gap
    assert all(len(torch.stack(blocks)[:, slot].unique()) == 4 for slot in range(32))
    assert torch.equal(interlaced_places(8, 4), blocks[0])


def test_shifted_positions_are_those_of_the_place_shifted_to():
    positions = sincos_positions(num_blocks=4, grid_size=4, dim=32).view(4, 4, 4, 32)
    moved = positions @ position_shift(4, 4, 32, (-1, 2, 1)).T
    assert torch.allclose(moved[1:, :2, :3], positions[:3, 2:, 1:], atol=1e-5)


def test_shifted_attention_starts_at_the_offsets_of_its_heads():
    model = make_tokenizer(position_embedding="pooled", attention_init="shifted", decoder_num_heads=2)
    attention = model.decoder.layers[0].self_attention
    cells = sincos_positions(4, model.config.grid_size, model.config.decoder_hidden_size)  # (T, G^2, D)
    with torch.no_grad():
        q, k = (p(cells[1]).unflatten(-1, (2, -1)).transpose(0, 1) for p in (attention.q_proj, attention.k_proj))
    best = (q @ k.transpose(-1, -2)).argmax(-1).view(2, model.config.grid_size, model.config.grid_size)
    place = torch.arange(model.config.embeddings_per_block).view_as(best[0])
    assert HEAD_OFFSETS["decoder_self"][:2] == ((0, 0, 0), (0, 0, 1))
    assert (best[0] == place).float().mean() > 0.75
    assert (best[1, :, :-1] == place[:, 1:]).float().mean() > 0.75


def test_cosine_transform_is_orthonormal_and_its_spectrum_fits_real_frames(clips):
    transform, spectrum = cosine_transform(3, 4, 8, 8), patch_spectrum(3, 4, 8)
    assert torch.allclose(transform @ transform.T, torch.eye(768), atol=1e-5)
    flat = transform @ torch.ones(768)
    assert flat[0] == pytest.approx(768**0.5, rel=1e-5) and flat[1:].abs().max() < 1e-3
    assert spectrum[0] == spectrum.max() == 1
    amplitudes = (patchify(clips, 4, 8).flatten(0, 2) @ transform.T).std(0).view(3, 4, 8, 8)[0, 0]  # grey, at rest
    pair = torch.stack([amplitudes.flatten(), spectrum.view(3, 4, 8, 8)[0, 0].flatten()]).log()
    assert torch.corrcoef(pair)[0, 1] > 0.9


# --- encode and decode ------------------------------------------------------------------------------------------------


def test_the_batched_and_the_cached_way_agree(model, clips):
    dense = model(clips, MIXED)
    tokens = model.encode(clips, MIXED)
    assert torch.equal(tokens.ids, dense.ids)
    assert tokens.lengths.tolist() == dense.lengths.tolist() == MIXED
    assert tokens.ids.unique().numel() > 8  # the comparison is not of one constant
    video = model.decode(tokens)
    assert video.shape == dense.reconstruction.shape == clips.shape
    assert torch.allclose(video, dense.reconstruction.clamp(-1, 1), atol=2e-4)
    assert dense.reconstruction.std() > 0.05


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_two_ways_agree_with_the_choices_for_small_runs(preset, clips):
    small = EvatokConfig.from_preset(preset)
    names = [
        "token_patches",
        "position_embedding",
        "position_scale",
        "interlaced_positions",
        "patch_norm",
        "patch_basis",
        "initialization",
        "attention_init",
    ]
    model = make_tokenizer(**{name: getattr(small, name) for name in names})
    dense, tokens = model(clips, MIXED), model.encode(clips, MIXED)
    assert torch.equal(tokens.ids, dense.ids) and tokens.ids.unique().numel() > 8
    assert torch.allclose(model.decode(tokens), dense.reconstruction.clamp(-1, 1), atol=2e-4)


PATCH_TOKENS = {"position_embedding": "pooled", "token_patches": True, "patch_basis": "cosine"}


def test_tokens_that_start_as_patches_in_every_attention_and_in_half_precision(clips):
    model = make_tokenizer(**PATCH_TOKENS)
    expected = model(clips, MIXED)
    for attention in ("eager", "flex_attention"):
        other = make_tokenizer(attn_implementation=attention, **PATCH_TOKENS)
        with torch.no_grad():
            assert torch.allclose(other(clips, MIXED).reconstruction, expected.reconstruction, atol=2e-4)
    half = model.to(torch.bfloat16)
    decoded = half.decode(half.encode(clips.bfloat16(), MIXED))
    assert decoded.dtype == torch.bfloat16 and decoded.isfinite().all()


def test_tokens_that_start_as_patches_send_a_gradient_everywhere(clips):
    model = make_tokenizer(**PATCH_TOKENS).train()
    model(clips, MIXED).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_tokens_that_start_as_patches_see_no_later_block_and_no_other_clip(clips):
    model = make_tokenizer(**PATCH_TOKENS)
    changed = clips.clone()
    changed[1], changed[0, 8:] = 0.5, -0.5
    before, after = model.encode(clips, MIXED), model.encode(changed, MIXED)
    kept = sum(MIXED[0][:2])
    assert torch.equal(before.ids[:kept], after.ids[:kept])
    assert torch.equal(before.clip(2).ids, after.clip(2).ids) and not torch.equal(before.ids, after.ids)
    frames = [model.decode(tokens, exact=False) for tokens in (before, after)]
    assert torch.allclose(frames[0][0, :8], frames[1][0, :8], atol=1e-5)


def test_resizing_is_bilinear_interpolation_without_aliasing(clips):
    frames = clips[:, :2]
    for size in ((8, 16), (32, 64)):
        expected = F.interpolate(frames.flatten(0, 1), size, mode="bilinear", antialias=True)
        assert torch.allclose(resize(frames, *size).flatten(0, 1), expected, atol=1e-5)


def test_eager_and_sdpa_attention_agree(position, clips):
    eager, sdpa = (make_tokenizer(position_embedding=position, attn_implementation=name) for name in ("eager", "sdpa"))
    tokens = eager.encode(clips, MIXED)
    assert torch.equal(tokens.ids, sdpa.encode(clips, MIXED).ids)
    assert torch.allclose(eager.decode(tokens), sdpa.decode(tokens), atol=2e-4)
    a, b = (way(clips, MIXED, return_loss=True) for way in (eager, sdpa))
    assert torch.allclose(a.reconstruction, b.reconstruction, atol=2e-4)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_batches_agree_with_clips_on_their_own_but_for_ties(attention):
    """On real clips, by evatok-tiny, all kinds of assignments mixed in one batch."""
    folder = f"{bundled_checkpoints()['evatok-tiny']}/tokenizer"
    model = EvatokModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    lengths = model.assignment_space.all()[::29]  # (22, 4)
    processor = EvatokVideoProcessor.from_pretrained(folder)
    video = processor(list(real_frames()), return_tensors="pt").pixel_values_videos  # (3, 16, 3, 64, 64)
    video = video.repeat(8, 1, 1, 1, 1)[: len(lengths)]
    exact, batched = model.encode(video, lengths), model.encode(video, lengths, exact=False)
    assert torch.equal(exact.lengths, batched.lengths)
    other = (exact.ids != batched.ids).nonzero()[:, 0]
    assert len(other) <= 0.002 * len(exact.ids)
    layout = PaddedLayout(lengths)
    features = F.normalize(model.features(video, layout)[other], dim=-1)
    gaps = [(features * model.quantizer.to_codes(tokens.ids[other])).sum(-1) for tokens in (exact, batched)]
    assert ((gaps[0] - gaps[1]).abs() < 1e-4).all()
    some = slice(0, None, 5)
    parts = [exact.clip(index) for index in range(len(lengths))[some]]
    together = model.decode(VideoTokens.concatenate(parts), exact=False)
    assert torch.allclose(together, torch.cat([model.decode(part) for part in parts]), atol=1e-4)


def test_batches_ask_for_nothing_clip_by_clip(plain, clips, monkeypatch):
    """An accelerator is waited for a few times a batch, however many clips there are."""
    calls = []
    for name in ("tolist", "item", "__int__", "__bool__", "nonzero", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, f=real, **k: calls.append(self) or f(self, *a, **k))
    counts = []
    for copies in (1, 4):
        video = clips.repeat(copies, 1, 1, 1, 1)
        calls.clear()
        tokens = plain.encode(video, plain.assignment_space.all()[: len(video)], exact=False)
        plain.decode(tokens, exact=False)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_all_625_assignments_give_as_many_ids_as_they_say(clips):
    model = make_tokenizer(encoder_num_layers=1, decoder_num_layers=1)
    assignments = model.assignment_space.all()
    tokens = model.encode(clips[:1].expand(625, -1, -1, -1, -1), assignments)
    assert torch.equal(tokens.lengths, assignments) and tokens.ids.numel() == int(assignments.sum())
    assert int(tokens.ids.min()) >= 0 and int(tokens.ids.max()) < 256
    # Causality, exhaustively: the ids of a block follow from the lengths up to it, the later ones do not matter.
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    rows = tokens.ids.split(assignments.sum(-1).tolist())
    for lengths, row in zip(assignments.tolist(), rows, strict=True):
        for t, block in enumerate(row.split(lengths)):
            assert len(block) == lengths[t]
            assert torch.equal(seen.setdefault(tuple(lengths[: t + 1]), block), block)
    assert len(seen) == 5 + 25 + 125 + 625


def test_every_single_assignment_decodes(clips):
    model = make_tokenizer(encoder_num_layers=1, decoder_num_layers=1)
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
    first_changed = VideoTokens((before.ids + (torch.arange(128) < 32)) % 256, before.lengths)
    assert not torch.equal(model.decode(before)[:, 12:], model.decode(first_changed)[:, 12:])


def test_every_token_reaches_the_frames_of_its_block(plain, clips):
    tokens = plain.encode(clips[:1], [2, 4, 8, 2])
    frames = plain.decode(tokens)
    for index, block in enumerate([0] * 2 + [1] * 4 + [2] * 8 + [3] * 2):
        ids = tokens.ids.clone()
        ids[index] = (ids[index] + 1) % 256
        changed = plain.decode(VideoTokens(ids, tokens.lengths))
        assert not torch.equal(changed[:, 4 * block : 4 * block + 4], frames[:, 4 * block : 4 * block + 4])


def test_the_same_input_gives_the_same_output(model, clips):
    first, second = (model.encode(clips, MIXED) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(model.decode(first), model.decode(second))
    assert torch.equal(model(clips, MIXED).reconstruction, model(clips, MIXED).reconstruction)


def test_lengths_default_to_the_middle_candidate_and_may_be_one_row(plain, clips):
    assert plain.encode(clips).lengths.tolist() == [[8] * 4] * 3
    assert plain(clips).lengths.tolist() == [[8] * 4] * 3
    assert plain.encode(clips, [2, 4, 8, 16]).lengths.tolist() == [[2, 4, 8, 16]] * 3


def test_tokens_say_where_they_come_from(plain, clips, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "my-tokenizer")
    model = EvatokModel.from_pretrained(tmp_path / "my-tokenizer")
    tokens = model.encode(clips[:1])
    assert (tokens.height, tokens.width, tokens.fingerprint) == (32, 32, model.fingerprint())
    assert tokens.checkpoint == "my-tokenizer" and len(tokens.fingerprint) == 16


def test_tokens_are_an_output_of_transformers(plain, clips):
    tokens = plain.encode(clips, MIXED)
    assert isinstance(tokens, ModelOutput) and list(tokens)[:2] == ["ids", "lengths"] and len(tokens) == 3
    assert torch.equal(tokens["ids"], tokens.ids) and torch.equal(tokens[1], tokens.lengths)
    ids, lengths, *_ = plain.encode(clips, MIXED, return_dict=False)
    assert torch.equal(ids, tokens.ids) and torch.equal(lengths, tokens.lengths)


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


def test_tokens_of_another_checkpoint_are_refused_by_name(clips, tmp_path):
    first, other = make_tokenizer(), make_tokenizer(seed=1)
    for model in (first, other):
        model.save_pretrained(tmp_path)
    tokens = first.encode(clips[:1])
    tokens.checkpoint = "the-first-one"
    assert other.fingerprint() != first.fingerprint()
    with pytest.raises(ValueError, match="the-first-one") as caught:
        other.decode(tokens)
    assert tokens.fingerprint in str(caught.value) and other.fingerprint() in str(caught.value)
    tokens.fingerprint = None  # a generator need not know
    assert other.decode(tokens).shape == (1, 16, 3, 32, 32)


@pytest.mark.parametrize("wrong", [-1, 256])
def test_ids_outside_the_codebook_are_refused(plain, wrong):
    ids = torch.zeros(8, dtype=torch.int64)
    ids[3] = wrong
    with pytest.raises(ValueError, match="codebook has 256 entries"):
        plain.decode(VideoTokens(ids, torch.full((1, 4), 2)))


@pytest.mark.parametrize("wrong", [torch.arange(8), ((0, 1), (2,)), "clip.safetensors", None])
def test_what_is_no_tokens_is_refused(plain, wrong):
    message = r"is no VideoTokens; make them .*VideoTokens\(ids=.*VideoTokens.load\(path\)"
    tokenizer = VideoTokenizer(plain, EvatokVideoProcessor())
    for decode in (plain.decode, tokenizer.decode, tokenizer.streaming_decode().push):
        with pytest.raises(ValueError, match=message):
            decode(wrong)


def test_token_counts_that_are_no_assignment_are_refused(plain):
    with pytest.raises(ValueError, match=r"\[3\] are not among the candidates"):
        plain.decode(VideoTokens(torch.zeros(9, dtype=torch.int64), torch.tensor([[2, 2, 2, 3]])))
    with pytest.raises(ValueError, match="4 temporal blocks"):
        plain.decode(VideoTokens(torch.zeros(6, dtype=torch.int64), torch.tensor([[2, 2, 2]])))
