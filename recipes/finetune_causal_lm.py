# 4 ranks on CPU, tensor parallelism 2 x data parallelism 2 (no network; about five minutes on two cores):
#   accelerate launch --config_file recipes/configs/cpu_tp2_dp2.yaml recipes/finetune_causal_lm.py
# A model and data from the hub, on 8 GPUs:
#   accelerate launch --config_file recipes/configs/node8_tp2_dp4.yaml recipes/finetune_causal_lm.py \
#       --model_name_or_path Qwen/Qwen3-1.7B --learning_rate 2e-5 --block_size 1024 \
#       --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1
"""Fine-tune a causal language model with a plain Accelerate loop.

What makes it tensor parallel is one argument, `parallelism_config=TensorParallelDDPPlugin()`, and the launcher's
YAML. Without `--model_name_or_path` and `--dataset_name` it trains a Llama of 10 million parameters from scratch, on
the source text of Python's standard library.
"""

import argparse
import json
import math
import random
import sysconfig
import time
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    default_data_collator,
    get_cosine_schedule_with_warmup,
)

from accel_tp_ddp import TensorParallelDDPPlugin


def parse_args():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub name or folder; default: a small Llama from scratch")
    parser.add_argument("--dataset_name", help="hub name; default: the source text of Python's standard library")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--output_dir", default="outputs/finetune_causal_lm", help="on several nodes: a shared folder")
    parser.add_argument("--block_size", type=int, default=128, help="tokens a sample")
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--max_train_steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--max_eval_blocks", type=int, default=250)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--num_warmup_steps", type=int, default=10)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: what the launcher says")
    parser.add_argument("--report_to", help="a tracker Accelerate knows, such as tensorboard")
    parser.add_argument("--logging_steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    scratch = parser.add_argument_group("training from scratch")
    scratch.add_argument("--max_corpus_mb", type=float, default=4.0)
    scratch.add_argument("--vocab_size", type=int, default=8192)
    scratch.add_argument("--hidden_size", type=int, default=320)
    scratch.add_argument("--num_hidden_layers", type=int, default=4)
    scratch.add_argument("--required_drop", type=float, default=5.0, help="factor by which perplexity must fall")
    return parser.parse_args()


def python_source_texts(max_bytes):
    """Train and validation texts, split by file: the standard library of the Python that runs this."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # What is installed beside the library, tests, and modules that are tables of data.
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = sorted(path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts))
    random.Random(0).shuffle(files)
    texts = {"train": [], "validation": []}
    total = 0
    for index, path in enumerate(files):
        text = path.read_text(encoding="utf-8", errors="ignore")
        total += len(text)
        if total > max_bytes:
            break
        texts["validation" if index % 20 == 0 else "train"].append(text)
    return texts


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def repeat_forever(loader):
    while True:
        yield from loader


@torch.no_grad()
def perplexity(model, loader, gather):
    """Over all blocks of `loader`, each counted once: one loss a block, so that `gather` can cut the padded tail."""
    model.eval()
    losses = []
    for batch in loader:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        losses_of_tokens = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none"
        )
        losses.append(gather(losses_of_tokens.mean(dim=1)).cpu())
    model.train()
    return math.exp(torch.cat(losses).double().mean().item())


def main():
    args = parse_args()
    started = time.monotonic()

    # The one line about tensor parallelism. Its sizes come from the launcher's YAML.
    plugin = TensorParallelDDPPlugin()
    accelerator = Accelerator(
        parallelism_config=plugin,
        cpu=not torch.accelerator.is_available(),  # without it, the ranks of a machine without GPUs never meet
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=args.output_dir,
        # At the end the main process checks the checkpoint alone, and the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    accelerator.init_trackers("finetune_causal_lm", config={k: v for k, v in vars(args).items() if v is not None})
    set_seed(args.seed)
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()

    # Text
    with accelerator.main_process_first():
        if args.dataset_name:
            texts = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
            if "validation" not in texts:
                texts = texts["train"].train_test_split(test_size=0.05, seed=args.seed)
                texts["validation"] = texts.pop("test")
        else:
            corpus = python_source_texts(args.max_corpus_mb * 1e6)
            texts = datasets.DatasetDict(
                {split: datasets.Dataset.from_dict({args.text_column: corpus[split]}) for split in corpus}
            )

    # Tokenizer
    with accelerator.main_process_first():
        if args.model_name_or_path:
            tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        else:
            if accelerator.is_main_process:
                train_tokenizer(texts["train"][args.text_column], args.vocab_size).save_pretrained(args.output_dir)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output_dir)

    # Blocks of `block_size` tokens
    def to_blocks(rows):
        tokens = []
        for ids in tokenizer(rows[args.text_column], add_special_tokens=False)["input_ids"]:
            tokens += ids + [tokenizer.eos_token_id]
        starts = range(0, len(tokens) - args.block_size + 1, args.block_size)  # a shorter rest is left out
        blocks = [tokens[start : start + args.block_size] for start in starts]
        return {"input_ids": blocks, "labels": blocks}

    with accelerator.main_process_first():
        blocks = datasets.DatasetDict(
            {
                split: texts[split].map(to_blocks, batched=True, remove_columns=texts[split].column_names)
                for split in ("train", "validation")
            }
        )
    train_blocks = blocks["train"]
    eval_blocks = blocks["validation"].select(range(min(args.max_eval_blocks, len(blocks["validation"]))))

    # Model: fp32 weights, whatever the precision of the computation
    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=args.vocab_size,
                hidden_size=args.hidden_size,
                intermediate_size=args.hidden_size * 8 // 3 // 16 * 16,
                num_hidden_layers=args.num_hidden_layers,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=max(512, args.block_size),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=None,
            )
        )
    parameter_count = sum(parameter.numel() for parameter in model.parameters())

    # Optimizer, loaders, schedule
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    train_loader = DataLoader(
        train_blocks,
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=default_data_collator,
    )
    eval_loader = DataLoader(eval_blocks, batch_size=args.per_device_eval_batch_size, collate_fn=default_data_collator)
    # A prepared scheduler advances once for each replica at every optimizer step.
    scheduler = get_cosine_schedule_with_warmup(
        optimizer,
        num_warmup_steps=args.num_warmup_steps * plugin.dp_replicate_size,
        num_training_steps=args.max_train_steps * plugin.dp_replicate_size,
    )
    unprepared_eval_loader = eval_loader  # for the check at the end, in one process
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )

    accelerator.print(
        f"{parameter_count / 1e6:.1f} M parameters; {len(train_blocks)} training and {len(eval_blocks)} validation "
        f"blocks of {args.block_size} tokens; {plugin.dp_replicate_size} replicas of {plugin.tp_size} ranks"
    )
    before = perplexity(model, eval_loader, accelerator.gather_for_metrics)
    accelerator.print(f"validation perplexity before training: {before:.2f}")

    # Train
    model.train()
    training_started = time.monotonic()
    progress = tqdm(total=args.max_train_steps, disable=not accelerator.is_local_main_process, desc="train")
    loss_sum, loss_count = 0.0, 0
    step = 0
    for batch in repeat_forever(train_loader):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        loss_sum, loss_count = loss_sum + loss.detach(), loss_count + 1
        if not accelerator.sync_gradients:
            continue

        step += 1
        progress.update()
        if step % args.logging_steps == 0 or step == args.max_train_steps:
            metrics = {
                "loss": accelerator.gather(loss_sum / loss_count).mean().item(),
                "grad_norm": float(grad_norm),
                "learning_rate": scheduler.get_last_lr()[0],
            }
            accelerator.log(metrics, step=step)
            progress.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()})
            loss_sum, loss_count = 0.0, 0
        if step == args.max_train_steps:
            break
    progress.close()
    training_seconds = time.monotonic() - training_started
    blocks_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * plugin.dp_replicate_size
    tokens_per_second = step * blocks_a_step * args.block_size / training_seconds

    after = perplexity(model, eval_loader, accelerator.gather_for_metrics)
    accelerator.log({"perplexity": after}, step=step)
    accelerator.print(f"validation perplexity after {step} steps: {after:.2f}")

    # Save: every rank takes part, the main process writes.
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )

    # Check, as a reader of the checkpoint would: in one process, with nothing but transformers.
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
        reloaded_model = AutoModelForCausalLM.from_pretrained(args.output_dir).to(accelerator.device).eval()
        batches = (
            {name: value.to(accelerator.device) for name, value in batch.items()} for batch in unprepared_eval_loader
        )
        with accelerator.autocast():
            reloaded = perplexity(reloaded_model, batches, gather=lambda losses: losses)

        prompt = torch.tensor([eval_blocks[len(eval_blocks) // 2]["input_ids"][:32]], device=accelerator.device)
        generated = reloaded_model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=True, top_k=20
        )
        print("a generated sample\n  prompt: ", repr(tokenizer.decode(generated[0, : prompt.shape[1]])))
        print("  continues:", repr(tokenizer.decode(generated[0, prompt.shape[1] :])))

        results = {
            "perplexity_before": before,
            "perplexity_after": after,
            "perplexity_reloaded": reloaded,
            "steps": step,
            "seconds": time.monotonic() - started,
            "tokens_per_second": tokens_per_second,
        }
        Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(
            f"validation perplexity {before:.2f} before, {after:.2f} after, {reloaded:.2f} from the checkpoint in "
            f"{args.output_dir}; {tokens_per_second:.0f} tokens/s, {results['seconds']:.0f} s in all"
        )
        # In half precision the order in which ranks add up shows.
        tolerance = 1e-4 if accelerator.mixed_precision == "no" else 1e-2
        if abs(reloaded - after) > tolerance * after:
            raise SystemExit(f"the checkpoint is not the trained model: perplexity {reloaded} against {after}")
        if not args.model_name_or_path and before < args.required_drop * after:
            raise SystemExit(f"perplexity fell from {before} to {after}, less than {args.required_drop}-fold")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
