"""Trains the demo checkpoint on two CPU cores; resumes from its state file, writes Hugging Face checkpoints as it goes.

python examples/receipts/train.py --work DIR --steps 10000
"""

import argparse
import math
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from batches import NO_TARGET, Batch, Lesson, into_batches, make_rows, training_batches
from evaluate import load_model
from inputs import normalise
from model import build_model
from save import save_checkpoint
from tokenizer import train_tokenizer
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

WATCH_SEED = 1000  # held-out receipts to watch the training by; the reported ones are another stream
WARM_UP_STEPS = 100
AVERAGE = 0.998
LOG_EVERY = 25
PUBLISH_EVERY = 250


def answer_logits(model, batch: Batch) -> torch.Tensor:
    """Logits [answer tokens, vocabulary] where a target is, in row-major order."""
    hidden = model.model(
        input_ids=batch.tokens,
        pixel_values=torch.from_numpy(normalise(batch.patches.numpy())),
        image_grid_thw=batch.grid,
        position_ids=batch.positions,
        # of one layer type, as the model would make it itself
        attention_mask={"full_attention": batch.attention_bias(model.dtype)},
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.targets != NO_TARGET])


def loss_of(model, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy of the answer tokens."""
    wanted = batch.targets != NO_TARGET
    losses = cross_entropy(answer_logits(model, batch).float(), batch.targets[wanted], reduction="none")
    weights = batch.weights[wanted]
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def exact_by_kind(model, batches: list[Batch]) -> dict[str, float]:
    """Share of answers all of whose tokens are the greedy choice: what free-running generation would give, float32."""
    right, asked = defaultdict(int), defaultdict(int)
    for batch in batches:
        correct = torch.ones_like(batch.targets, dtype=torch.bool)
        wanted = batch.targets != NO_TARGET
        correct[wanted] = answer_logits(model, batch).argmax(-1) == batch.targets[wanted]
        for number, kinds in enumerate(batch.kinds):
            for branch, kind in enumerate(kinds, start=1):
                right[kind] += bool(correct[number][batch.branch[number] == branch].all())
                asked[kind] += 1
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}


def make_optimizers(model: torch.nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and merger, AdamW for the rest: embeddings, patches, norms, biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)]


def learning_share(step: int, progress: float) -> float:
    """Part of the peak learning rate: linear warm-up by steps, then a cosine over all steps."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.0, 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def average_over_ranks(swift: torch.nn.Module, model: torch.nn.Module, *numbers: float) -> list[float]:
    """Give `model` the mean over the ranks of the gradients of `swift`; the means of `numbers` come back."""
    flat = torch.cat([torch.tensor(numbers), *(p.grad.flatten().float() for p in swift.parameters())])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat[len(numbers) :].split([p.numel() for p in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return flat[: len(numbers)].tolist()


@dataclass
class Run:
    """All that a resumed run needs: the model, its optimizers, a running average of the weights and where it stood."""

    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: dict[str, torch.Tensor]
    lesson: Lesson
    step: int = 0
    chunk: int = 0
    seconds: float = 0.0

    def load(self, file: Path) -> None:
        """Continue after the chunk that the state was written in."""
        state = torch.load(file)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average, self.step, self.lesson = state["average"], state["step"], Lesson(state.get("lesson", 0))
        self.chunk, self.seconds = state["chunk"] + 1, state["seconds"]

    def save(self, file: Path) -> None:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"model": self.model.state_dict(), "optimizers": optimizers, "average": self.average}
        state |= {"step": self.step, "chunk": self.chunk, "seconds": self.seconds, "lesson": self.lesson.number}
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)


def publish(run: Run, tokenizer: Tokenizer, watch: list[Batch], folder: Path) -> None:
    """Write a checkpoint of the averaged weights, then print how much they read of unseen receipts."""
    own = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.model.load_state_dict(run.average, strict=False)
    save_checkpoint(run.model, tokenizer, folder)
    shares = exact_by_kind(run.model, watch)
    run.model.load_state_dict(own, strict=False)
    print("  held-out " + " ".join(f"{kind} {share:.3f}" for kind, share in shares.items()), flush=True)


def train(rank: int, args: argparse.Namespace) -> None:
    """One of `args.ranks` processes, each with one thread and receipts of its own."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rendezvous = f"file://{(args.work / 'rendezvous').resolve()}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.ranks)
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    model = build_model(tokenizer.get_vocab(), args.seed)
    if args.start is not None and not (args.work / "state.pt").exists():
        model.load_state_dict(load_model(args.start).state_dict())
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = Run(model, make_optimizers(model, args.weight_decay), average, Lesson())
    if (args.work / "state.pt").exists():
        run.load(args.work / "state.pt")
    swift = build_model(tokenizer.get_vocab(), args.seed).to(
        torch.bfloat16
    )  # computes; float32 weights are kept beside
    watch = into_batches(make_rows(tokenizer, "heldout", WATCH_SEED, range(64))) if rank == 0 else []

    begun, losses = time.monotonic() - run.seconds, []
    for chunk, batch in training_batches(tokenizer, args.seed + rank, run.chunk, run.lesson):
        run.chunk = chunk
        swift.load_state_dict(model.state_dict())
        swift.zero_grad(set_to_none=True)
        loss = loss_of(swift, batch)
        loss.backward()
        mean_loss, run.seconds = average_over_ranks(swift, model, loss.item(), time.monotonic() - begun)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress = (run.step + 1) / args.steps
        for optimizer in run.optimizers:
            optimizer.param_groups[0]["lr"] = args.learning_rate * learning_share(run.step, progress)
            optimizer.step()
        run.step += 1
        weights = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(run.average.values()), weights, 1 - min(AVERAGE, run.step / (run.step + 10)))
        losses.append(mean_loss)
        if run.step % LOG_EVERY == 0:
            mean = sum(losses) / len(losses)
            losses = []
            if rank == 0:
                shown = f"minutes {run.seconds / 60:.1f} lesson {run.lesson.number} loss {mean:.4f}"
                print(f"step {run.step} chunk {run.chunk} {shown}", flush=True)
            run.lesson.advance(mean, progress)
        if rank == 0 and (run.step % PUBLISH_EVERY == 0 or progress >= 1):
            publish(run, tokenizer, watch, args.work / "checkpoint")
            run.save(args.work / "state.pt")
        if progress >= 1:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the receipts demo.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state, the log and the checkpoint")
    parser.add_argument("--steps", type=int, default=10000, help="in all, over every resumption; about 0.6 s each")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="checkpoint whose weights and tokenizer to begin with")
    parser.add_argument("--ranks", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "rendezvous").unlink(missing_ok=True)
    if args.start is not None:
        shutil.copy(args.start / "tokenizer.json", args.work / "tokenizer.json")
    if not (args.work / "tokenizer.json").exists():
        train_tokenizer().save(str(args.work / "tokenizer.json"))
    torch.multiprocessing.spawn(train, (args,), nprocs=args.ranks)


if __name__ == "__main__":
    main()
