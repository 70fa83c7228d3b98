"""A package at work. Every stage can be called by itself; `generate` and `stream` call them in order.

    S  tokens                          C  vision size
    P  patches of all visuals          D  hidden size
    R  rows in place of placeholders   V  vocabulary

What a model can do follows from the roles that its package has: without vision_encoder or patch_embed it reads text
only, without decoder it sees only.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Cache, plan_cache_length
from .encode import EncodeOptions, ImageEncoding, VisionOutput, encode_patches, prepare_images
from .errors import InputError, PackageError
from .generate import Generation, GenerationOptions, GenerationStream, Timings, generate_tokens, sampling_params
from .image import ImageOptions, ImageSource, Patches
from .manifest import GenerationDefaults
from .opened import OpenedPackage
from .prepare import Prepared, prepare_ids, prepare_messages
from .sample import Sampler
from .session import Array
from .text_stream import TextStream
from .token_drop import kept_inputs
from .vision_inputs import vision_inputs

__all__ = ["Model", "VisionOutput"]

Messages = Sequence[Mapping[str, Any]]
_DEFAULTS = GenerationOptions()
_NO_TIME = Timings()


class Model(OpenedPackage):
    """The stages of a package, and its answers. Threads may share one: each answer has a cache of its own."""

    # The stages, in their order.

    def prepare(
        self,
        messages: Messages,
        options: Mapping[str, Any] | None = None,
        *,
        folder: Path | None = None,
        allow_files: bool = True,
    ) -> Prepared:
        """Messages to ids, patches and positions; no graph is run. See prepare.prepare_messages."""
        return prepare_messages(
            self.builder, self.manifest, messages, options or {}, folder=folder, allow_files=allow_files
        )

    def prepare_ids(self, input_ids: Array, images: Sequence[Patches] = (), videos: Sequence[Patches] = ()) -> Prepared:
        """The same from ids [S] whose placeholders are expanded already."""
        return prepare_ids(self.builder, self.manifest, input_ids, images, videos)

    def encode_vision(self, patches: Sequence[Patches]) -> VisionOutput:
        """All images and clips in one packed call; rows in the order given. Raises PackageError without the role."""
        assert patches
        if "patch_embed" in self.manifest.roles:
            return self._embed_patches(patches)
        encoder = self.session("vision_encoder")
        projector = self.session("projector") if "projector" in self.manifest.roles else None
        feeds = {"pixel_values": np.concatenate([item.pixel_values for item in patches])}
        started = time.perf_counter()
        feeds |= self._index_inputs(patches)
        encoded = encoder.run(feeds, ["vision_features"], release_memory=True)
        vision_PC = encoded["vision_features"].astype(np.float32, copy=False)
        between = time.perf_counter()
        features_RD = vision_PC
        if projector is not None:
            indices = self._index_inputs(patches, projector=True)
            projected = projector.run(
                {"vision_features": vision_PC, **indices}, ["image_features"], release_memory=True
            )
            features_RD = projected["image_features"]
        timings = Timings(vision=between - started, projector=time.perf_counter() - between)
        return VisionOutput(vision_PC, features_RD.astype(np.float32, copy=False), timings)

    def classify(self, features_ID: Array) -> Array:
        """Class scores of pooled images, float32 [I, C], before softmax or sigmoid."""
        found = self.session("classifier").run({"image_features": features_ID}, ["logits"])
        return found["logits"].astype(np.float32, copy=False)

    def features(self, prepared: Prepared) -> VisionOutput | None:
        """`encode_vision` of all that the prompt shows, in the order of its placeholders; None for text alone."""
        return self.encode_vision(prepared.visuals) if prepared.visuals else None

    def embed(self, prepared: Prepared, features_RD: Array | None = None) -> Array:
        """Embeddings of the prompt, float32 [S, D], with the rows of `features_RD` in place of the placeholders'."""
        num_rows = 0 if features_RD is None else len(features_RD)
        expected = sum(run.length for run in prepared.runs)
        if num_rows != expected:
            raise InputError(
                f"features: {num_rows} rows for {expected} placeholders; encode the visuals of this prompt"
            )
        embeds_SD = self._embed(prepared.table_ids)
        row = 0
        for run in prepared.runs:
            assert features_RD is not None
            embeds_SD[run.start : run.start + run.length] = features_RD[row : row + run.length]
            row += run.length
        return embeds_SD

    def new_cache(self, max_length: int) -> Cache:
        """An empty cache for `max_length` tokens."""
        return self.decoder.new_cache(max_length)

    def prefill(
        self,
        embeds_SD: Array,
        position_ids: Array,
        cache: Cache,
        *,
        visual_S: Array | None = None,
        all_logits: bool = False,
    ) -> Array:
        """Adds S tokens to the cache. Returns float32 logits [1, V] of the last, or [S, V]. See Decoder.prefill."""
        return self.decoder.prefill(embeds_SD, position_ids, cache, visual_S=visual_S, all_logits=all_logits)

    def prefill_prepared(
        self, prepared: Prepared, embeds_SD: Array, cache: Cache, *, all_logits: bool = False
    ) -> Array:
        """The same for a prompt and its embeddings: of the tokens that the decoder sees, by their modality."""
        return self.prefill(
            prepared.seen(embeds_SD),
            prepared.seen_positions,
            cache,
            visual_S=prepared.seen(prepared.visual_tokens),
            all_logits=all_logits,
        )

    def step(self, token_id: int, cache: Cache, rope_delta: int = 0) -> Array:
        """Adds one generated token to the cache. Returns float32 logits [V]."""
        embeds_D = self._embed(np.array([token_id], np.int64))[0]
        return self.decoder.step(embeds_D, cache.length + rope_delta, cache)

    def logits(self, input_ids: Array, images: Sequence[Patches] = (), videos: Sequence[Patches] = ()) -> Array:
        """Logits of every token that the decoder sees, float32 [S, V]. Placeholders in `input_ids` are expanded."""
        prepared = self.prepare_ids(input_ids, images, videos)
        seen = self.features(prepared)
        embeds_SD = self.embed(prepared, seen.features if seen else None)
        cache = self.new_cache(plan_cache_length(self.cache_spec, len(embeds_SD), 0, self.options.cache_length))
        return self.prefill_prepared(prepared, embeds_SD, cache, all_logits=True)

    # All of them together.

    def encode_images(
        self,
        images: Sequence[ImageSource],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        token_drop: float | Sequence[float] = 0.0,
        seed: int | None = None,
        max_patches: int | None = None,
    ) -> ImageEncoding:
        """One embedding an image, and class scores where there is a classifier. For packages without a decoder.

        Images of any sizes go through in one call, or in calls of at most `max_patches` patches. token_drop: share of
        patches to leave out at random (`seed` draws the same again), for all images or one each. Raises InputError and
        CapacityError naming the image, PackageError where the package answers prompts instead.
        """
        if "decoder" in self.manifest.roles:
            raise PackageError(f"{self.package.path}: answers prompts about images; call generate with a message")
        options = EncodeOptions(ImageOptions(min_pixels, max_pixels), token_drop, seed, max_patches)
        patches, timings = prepare_images(self.manifest.image, images, options)
        return self.encode_patches(patches, max_patches=max_patches, timings=timings)

    def encode_patches(
        self, patches: Sequence[Patches], *, max_patches: int | None = None, timings: Timings = _NO_TIME
    ) -> ImageEncoding:
        """The same for images that are cut up already. `timings`: of what came before."""
        classify = self.classify if "classifier" in self.manifest.roles else None
        return encode_patches(patches, self.encode_vision, classify, max_patches, timings)

    def generate(
        self,
        messages: Messages,
        options: Mapping[str, Any] | None = None,
        *,
        max_new_tokens: int = _DEFAULTS.max_new_tokens,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Answers. See `stream`."""
        return self.stream(
            messages,
            options,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        ).finish()

    def stream(
        self,
        messages: Messages,
        options: Mapping[str, Any] | None = None,
        *,
        max_new_tokens: int = _DEFAULTS.max_new_tokens,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> GenerationStream:
        """Answers piece by piece.

        options: of the template and the preprocessing, by upstream names. What is None is as the checkpoint's own
        generation_config says; temperature 0 is greedy. stop: strings that end the answer and are not part of it.
        Raises InputError and CapacityError before anything is computed.
        """
        sampling = sampling_params(
            self._generation,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        asked = GenerationOptions(max_new_tokens, sampling, tuple(stop), ignore_eos)
        return self.stream_prepared(self.prepare(messages, options), asked)

    def stream_prepared(self, prepared: Prepared, options: GenerationOptions) -> GenerationStream:
        """The same for a prompt that is prepared already."""
        num_tokens = prepared.num_seen
        length = plan_cache_length(self.cache_spec, num_tokens, options.max_new_tokens, self.options.cache_length)
        # The last token is never put through the decoder, so it needs no room.
        options = replace(options, max_new_tokens=min(options.max_new_tokens, length - num_tokens + 1))
        decoder = self.decoder
        self.session("embed_tokens")
        caches: list[Cache] = []

        def prefill() -> tuple[Array, Timings]:
            seen = self.features(prepared)
            started = time.perf_counter()
            caches.append(decoder.new_cache(length))
            embeds_SD = self.embed(prepared, seen.features if seen else None)
            logits_V = self.prefill_prepared(prepared, embeds_SD, caches[0])[0]
            spent = seen.timings if seen else Timings()
            timings = replace(
                prepared.timings,
                vision=spent.vision,
                projector=spent.projector,
                prefill=time.perf_counter() - started,
                num_prompt_tokens=len(prepared.input_ids),
            )
            return logits_V, timings

        def step(token_id: int) -> Array:
            return self.step(token_id, caches[0], prepared.rope_delta)

        penalised = prepared.table_ids.tolist() if self._generation.penalty_sees_prompt else ()
        sampler = Sampler(options.sampling, penalised)
        text_stream = TextStream(self.builder.tokenizer, options.stop)
        eos = self._generation.eos_token_ids
        return GenerationStream(generate_tokens(prefill, step, sampler, text_stream, options, eos))

    def generate_prepared(self, prepared: Prepared, options: GenerationOptions) -> Generation:
        """The whole answer to a prompt that is prepared already."""
        return self.stream_prepared(prepared, options).finish()

    @property
    def _generation(self) -> GenerationDefaults:
        return self.manifest.generation or GenerationDefaults(eos_token_ids=())

    def _index_inputs(self, patches: Sequence[Patches], *, projector: bool = False) -> dict[str, Array]:
        spec = self.manifest.vision
        if spec is None:
            return {}
        grids = [item.grid for item in patches]
        found = vision_inputs(spec, grids, spec.projector_inputs if projector else spec.inputs)
        return kept_inputs(found, grids, [item.kept for item in patches])

    def _embed_patches(self, patches: Sequence[Patches]) -> VisionOutput:
        """`encode_vision` where patches become rows at once."""
        feeds = {"pixel_values": np.concatenate([item.pixel_values for item in patches])}
        started = time.perf_counter()
        feeds |= self._index_inputs(patches)
        found = self.session("patch_embed").run(feeds, ["image_features"], release_memory=True)["image_features"]
        return VisionOutput(None, found.astype(np.float32, copy=False), Timings(vision=time.perf_counter() - started))

    def _embed(self, input_ids: Array) -> Array:
        embeds = self.session("embed_tokens").run({"input_ids": input_ids[None]}, ["inputs_embeds"])["inputs_embeds"]
        return embeds[0].astype(np.float32, copy=False)
