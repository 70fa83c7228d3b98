"""VideoLLaMA 2: prompts, stills and clips in one prompt, real video files, and what its files may say."""

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from vlmport.cli.main import main
from vlmport.export.checkpoint import Checkpoint
from vlmport.export.families.videollama2 import FAMILY, SYSTEM_TEXT
from vlmport.export.graphs import float_graphs
from vlmport.runtime import InputError, Model
from vlmport.runtime.errors import CheckpointError
from vlmport.runtime.image import MAX_SOURCE_PIXELS

GOLDENS = Path(__file__).parent / "goldens" / "videollama2"
MISTRAL, QWEN2 = GOLDENS / "mistral_clip_stc", GOLDENS / "qwen2_siglip_stc_v35"
CONFIG = FAMILY.tiny_config
EOS = [{"content": "</s>", "id": 2, "special": True}]
DOCUMENTS: dict[str, Any] = {
    "tokenizer.json": {"added_tokens": EOS},
    "tokenizer_config.json": {"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
    "generation_config.json": {"eos_token_id": 7, "repetition_penalty": 1.05, "do_sample": True},
    "tower_clip/preprocessor_config.json": {"size": 56, "crop_size": 56},
}


@pytest.fixture(scope="module")
def model(package_of: Any) -> Any:
    with Model.load(package_of(MISTRAL), "fp32", num_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def qwen2(package_of: Any) -> Any:
    with Model.load(package_of(QWEN2), "fp32", num_threads=1) as opened:
        yield opened


def clip(count: int, height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def turn(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def image(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **options}


def video(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **options}


# Prompts


def test_the_tag_stands_before_the_first_message_whatever_comes_first(model: Model) -> None:
    prefix = f"<s>{SYSTEM_TEXT}\n\n"
    picture = image(clip(1)[0])
    for messages, text in (
        ([turn("What?")], "[INST] \nWhat? [/INST]"),
        ([{"role": "user", "content": "What?"}], "[INST] \nWhat? [/INST]"),
        ([turn(picture, "What?")], "[INST] <image>\nWhat? [/INST]"),
        ([turn("What?", picture)], "[INST] <image>\nWhat? [/INST]"),
        ([turn(video(clip(3)), "What?")], "[INST] <video>\nWhat? [/INST]"),
        ([turn("Be short.", role="system"), turn(picture, "What?")], "<image>\nBe short.\n\n[INST] What? [/INST]"),
        (
            [turn(picture, "What?"), turn("A fox.", role="assistant"), turn("And?", video(clip(2)))],
            "[INST] <image>\nWhat? [/INST] A fox.</s>[INST] <video>\nAnd? [/INST]",
        ),
    ):
        prepared = model.prepare(messages)
        assert prepared.text == prefix + text
        kinds = [run.kind for run in prepared.runs]
        assert kinds == [kind for kind in ("image", "video") if f"<{kind}>" in text]
        assert all(run.length == 75 for run in prepared.runs)
        assert (prepared.input_ids == -200).sum() == 75 * kinds.count("image")
        assert (prepared.input_ids == -201).sum() == 75 * kinds.count("video")


def test_the_other_decoder_has_its_tokenizer_s_own_system_text(qwen2: Model) -> None:
    text = qwen2.prepare([turn("What?")]).text
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n\nWhat?")


def test_a_user_can_make_no_slot_and_no_special_token(model: Model) -> None:
    text = "Is <video> a tag, and <image> one, and </s> an end?"
    prepared = model.prepare([turn(image(clip(1)[0]), text)])
    assert [run.kind for run in prepared.runs] == ["image"]
    plain = model.builder.tokenizer.encode("\nIs <video> a tag, and <image> one, and ", add_special_tokens=False).ids
    start = prepared.runs[0].start + prepared.runs[0].length
    assert prepared.input_ids[start : start + len(plain)].tolist() == plain
    end = model.builder.tokenizer.token_to_id("</s>")
    assert (prepared.input_ids[start:] == end).sum() == 0


# Stills and clips


def test_what_a_clip_becomes_does_not_depend_on_what_shares_its_call(model: Model) -> None:
    parts = [image(clip(1)[0]), video(clip(9, seed=1)), video(list(clip(7, 30, 30, seed=2))), image(clip(1, seed=3)[0])]
    together = model.prepare([turn(*parts, "What?")])
    assert [run.length for run in together.runs] == [75, 75, 4 * 25, 75]
    packed = model.features(together)
    assert packed is not None
    start = 0
    for part, run in zip(parts, together.runs, strict=True):
        alone = model.features(model.prepare([turn(part, "What?")]))
        assert alone is not None
        np.testing.assert_allclose(packed.features[start : start + run.length], alone.features, atol=2e-5)
        start += run.length


def test_a_still_goes_through_the_tower_once(model: Model) -> None:
    prepared = model.prepare([turn(image(clip(1)[0]), "What?")])
    seen, same = model.features(prepared), model.features(model.prepare([turn(video([clip(1)[0]] * 4), "What?")]))
    assert seen is not None
    assert same is not None
    assert (len(seen.vision), len(same.vision)) == (64, 256)
    np.testing.assert_allclose(seen.features, same.features, atol=2e-5)


def test_squares_on_request_alone(model: Model) -> None:
    wide = Image.fromarray(clip(1, 20, 60)[0])
    whole = model.prepare([turn(image(wide), "What?")], {"aspect_ratio": "pad"}).visuals[0]
    own = model.prepare([turn(image(wide, aspect_ratio="pad"), "What?")]).visuals[0]
    cropped = model.prepare([turn(image(wide), "What?")]).visuals[0]
    np.testing.assert_array_equal(whole.pixel_values, own.pixel_values)
    assert not np.array_equal(whole.pixel_values, cropped.pixel_values)
    top = whole.pixel_values.reshape(8, 8, 3, 14, 14)[0, :, :, 0]
    fill = (np.array([122, 116, 104]) / 255 - model.manifest.image.mean) / model.manifest.image.std
    np.testing.assert_allclose(top, np.broadcast_to(fill[:, None], top.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (video(np.zeros((0, 8, 8, 3), np.uint8)), "has no frames"),
        (video([]), "has no frames"),
        (video(clip(3), num_frames=1), "num_frames is 1; give at least 2"),
        (video(clip(3), s=5, e=9), "has no frame from second 5 to 9"),
        (image(clip(1)[0], max_pixels=1000), "max_pixels is no option of this package"),
        (image(Image.new("RGB", (MAX_SOURCE_PIXELS // 8, 1))), "one side 22369621 times the other"),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(model: Model, part: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        model.prepare([turn(part, "What?")])
    assert "\n" not in str(caught.value)


# Video files


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 frames at 10 a second, each of one grey."""
    file = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(file), "w") as container:
        track = container.add_stream("libx264", rate=10, options={"crf": "0"})
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for number in range(23):
            pixels = np.full((48, 64, 3), 10 * number, np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())
    return file


@pytest.mark.parametrize(
    ("options", "frames"),
    [({}, [3, 8, 14, 19]), ({"s": 1.0, "e": 2.0}, [10, 13, 15, 18]), ({"num_frames": 2}, [6, 17])],
)
def test_frames_of_a_file_are_those_of_its_middles(
    model: Model, mp4: Path, options: dict[str, Any], frames: list[int]
) -> None:
    found = model.prepare([turn(video(str(mp4)), "What?")], options).visuals[0]
    assert found.grid == (len(frames), 8, 8)
    spec = model.manifest.image
    grey = found.pixel_values.reshape(len(frames), 64, 3, -1)[:, :, 0].mean((1, 2)) * spec.std[0] + spec.mean[0]
    np.testing.assert_allclose(grey * 255, [10 * number for number in frames], atol=3)


def test_a_video_file_is_answered_on_the_command_line(
    package_of: Any, mp4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = str(package_of(MISTRAL))
    asked = ["run", package, "What happens?", "--video", str(mp4), "--max-new-tokens", "3", "--json"]
    for variant in ("fp32", "int4"):
        assert main([*asked, "--variant", variant]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["timings"]["num_prompt_tokens"] > 75
    damaged = mp4.parent / "damaged.mp4"
    damaged.write_bytes(mp4.read_bytes()[:200])
    assert main(["run", package, "What happens?", "--video", str(damaged)]) == 2
    assert "is not a video of a known format" in capsys.readouterr().err


# What the files may say


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mm_projector_type": "identity"}, "mm_projector_type is 'identity'; known are linear"),
        ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type is 'mlp0x_gelu'"),
        ({"mm_projector_type": "spatial_conv"}, "spatial_conv takes features of hidden_size 64, mm_hidden_size is 48"),
        ({"mm_projector_type": "stc_connector_v35", "num_frames": 1}, "num_frames: 1 is too few for stc_connector_v35"),
        ({"num_frames": 0}, "num_frames is 0, expected a number of at least 1"),
        ({"num_frames": 33}, "num_frames is 33, over the 32"),
        ({"num_frames": "8"}, "num_frames is '8', expected int"),
        ({"mm_hidden_size": 64}, "mm_hidden_size is 64, the vision tower's width 48"),
        ({"mm_vision_select_layer": -9}, "vision layer -9 is asked for, of a tower of 3 layers"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer is 'last', expected int"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'; give 'patch' or 'cls_patch'"),
        ({"mm_vision_select_feature": "cls_patch"}, "'cls_patch' does not go with stc_connector"),
        (
            {"mm_vision_tower": "my_siglip", "mm_vision_select_feature": "cls_patch"},
            "SigLIP's, which has no class token",
        ),
        ({"mm_vision_tower": "resnet"}, "mm_vision_tower 'resnet' names neither a CLIP nor a SigLIP tower"),
        ({"mm_vision_tower": "a/clip", "mm_vision_tower_config": None}, "'a/clip' is neither clip-vit.* nor a folder"),
        ({"tune_mm_mlp_adapter": True}, r"tune_mm_mlp_adapter is true: .*mm_projector\.bin"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        FAMILY.roles({**CONFIG, **changes})
    assert "\n" not in str(caught.value)


def test_the_experts_of_mixtral_are_of_no_known_family() -> None:
    assert not FAMILY.matches({**CONFIG, "model_type": "videollama2_mixtral"})
    assert FAMILY.matches({**CONFIG, "model_type": "videollama2"})


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", "/data/towers/clip-vit-large-patch14-336/"])
def test_known_towers_need_no_file(name: str) -> None:
    config = {**CONFIG, "mm_vision_tower": name, "mm_vision_tower_config": None, "mm_hidden_size": 1024}
    parts = FAMILY.manifest(config, DOCUMENTS)
    assert parts.image is not None
    assert parts.image.square is not None
    assert (parts.image.strategy, parts.image.square.side, parts.image.square.resized) == ("center_crop", 336, 336)
    config |= {"mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_hidden_size": 1152}
    parts = FAMILY.manifest(config, DOCUMENTS)
    assert parts.image is not None
    assert parts.image.square is not None
    assert (parts.image.strategy, parts.image.square.side, parts.image.mean) == ("stretch", 384, (0.5, 0.5, 0.5))


def test_a_tower_s_folder_brings_its_processor() -> None:
    with pytest.raises(CheckpointError, match=r"tower_clip/preprocessor_config\.json: missing"):
        FAMILY.manifest(CONFIG, {name: value for name, value in DOCUMENTS.items() if "tower" not in name})
    wrong = {**DOCUMENTS, "tower_clip/preprocessor_config.json": {"size": 70, "crop_size": 70}}
    with pytest.raises(CheckpointError, match="does not give what the vision tower takes, 56 x 56 pixels"):
        FAMILY.manifest(CONFIG, wrong)


def test_answers_are_greedy_and_end_where_either_file_says() -> None:
    generation = FAMILY.manifest(CONFIG, DOCUMENTS).generation
    assert generation is not None
    assert (generation.do_sample, generation.temperature, generation.top_p) == (False, 0.2, 0.9)
    assert generation.eos_token_ids == (7, 2)
    assert (generation.repetition_penalty, generation.penalty_sees_prompt) == (1.05, False)


@pytest.mark.parametrize(("window", "length"), [(None, 1024), (300, 300), (4096, 1024)])
def test_no_prompt_slides_out_of_a_window(window: int | None, length: int) -> None:
    parts = FAMILY.manifest({**CONFIG, "sliding_window": window}, DOCUMENTS)
    assert parts.cache is not None
    assert parts.cache.max_length == length


def test_every_row_of_a_frame_is_projected_where_the_class_token_is_kept() -> None:
    config = {**CONFIG, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "cls_patch"}
    parts = FAMILY.manifest(config, DOCUMENTS)
    assert parts.vision is not None
    assert parts.vision.first_rows == 1
    assert FAMILY.roles(config)["projector"].inputs[0].shape == ("num_feature_rows", 48)


def test_a_checkpoint_without_a_tensor_and_with_one_too_many(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MISTRAL, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    tower = "model.vision_tower.vision_tower.vision_model."
    tensors[f"{tower}embeddings.position_ids"] = np.arange(65)[None]  # of old checkpoints
    tensors[f"{tower}encoder.layers.4.mlp.fc1.bias"] = np.zeros(96, np.float32)  # beyond the tower's four layers
    del tensors["model.mm_projector.s1.b1.downsample.conv.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="2 tensors do not fit") as caught:
        float_graphs(folder, "cpu")
    assert "missing model.mm_projector.s1.b1.downsample.conv.weight [64, 48, 1, 1]" in str(caught.value)
    assert f"unexpected {tower}encoder.layers.4.mlp.fc1.bias [96]" in str(caught.value)


def test_folders_that_the_config_names_are_read_with_it() -> None:
    documents = Checkpoint.open(MISTRAL).documents
    assert documents["vision_tower_clip/config.json"]["hidden_size"] == 48
    assert "vision_tower_clip/preprocessor_config.json" in documents


def test_pixels_that_make_no_whole_patch_are_cut_off() -> None:
    tower = {**CONFIG["mm_vision_tower_config"], "image_size": 60}
    processor = {"size": {"height": 60, "width": 60}}
    config = {**CONFIG, "mm_vision_tower": "my_siglip", "mm_vision_tower_config": tower}
    parts = FAMILY.manifest(config, {**DOCUMENTS, "my_siglip/preprocessor_config.json": processor})
    assert parts.image is not None
    assert parts.image.square is not None
    assert (parts.image.square.side, parts.image.patch_size) == (60, 14)
    assert FAMILY.roles(config)["vision_encoder"].multiples == {"num_patches": 16}


def test_the_message_of_an_option_names_it(model: Model) -> None:
    with pytest.raises(InputError, match=r"options\.s: is '1'; give a number"):
        model.prepare([turn(video(clip(3)), "What?")], {"s": "1"})
