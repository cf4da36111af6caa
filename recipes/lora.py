# 4 ranks on CPU, tensor parallelism 2 x data parallelism 2 (no network; about 90 s on two cores):
#   accelerate launch --config_file recipes/configs/cpu_tp2_dp2.yaml -m accel_tp_ddp.launch recipes/lora.py
# A model from the hub, on 8 GPUs:
#   accelerate launch --config_file recipes/configs/node8_tp2_dp4.yaml -m accel_tp_ddp.launch recipes/lora.py \
#       --model_name_or_path Qwen/Qwen3-8B --learning_rate 1e-4 --block_size 1024
"""Train LoRA adapters (PEFT) on the source text of Python's standard library, and load them in plain PEFT.

Without `--model_name_or_path` the frozen base is a small Llama with random weights, read byte by byte; its head and
embedding are then trained too (`modules_to_save`).
"""

import argparse
import itertools
import json
import math
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM


def parse_args():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub name or folder; default: a small Llama with random weights")
    parser.add_argument("--output_dir", default="outputs/lora")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--block_size", type=int, default=128, help="tokens a sample")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--max_train_steps", type=int, default=100)
    parser.add_argument("--max_eval_blocks", type=int, default=101)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def base_model(args):
    if args.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    torch.manual_seed(args.seed)  # the same weights whenever they are asked for
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=384, tie_word_embeddings=False, **sizes))


def token_blocks(tokenizer, args):
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    blocks = ids[: len(ids) // args.block_size * args.block_size].view(-1, args.block_size)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(args.seed))]


@torch.no_grad()
def perplexity(model, loader, gather):
    model.eval()
    losses = []
    for ids in loader:
        logits = model(input_ids=ids).logits[:, :-1].float()
        of_tokens = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(gather(of_tokens.mean(dim=1)).cpu())
    model.train()
    return math.exp(torch.cat(losses).mean().item())


def main():
    args = parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path) if args.model_name_or_path else ByT5Tokenizer()
    blocks = token_blocks(tokenizer, args)
    eval_blocks, train_blocks = blocks[: args.max_eval_blocks], blocks[args.max_eval_blocks :]
    eval_loader = DataLoader(eval_blocks, batch_size=16)
    train_loader = DataLoader(train_blocks, batch_size=args.per_device_train_batch_size, shuffle=True, drop_last=True)

    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        modules_to_save=None if args.model_name_or_path else ["lm_head", "embed_tokens"],
        **{"r": args.r, "lora_alpha": 2 * args.r, "lora_dropout": 0.05},
    )
    model = get_peft_model(base_model(args), config)
    accelerator.print("{:,} of {:,} parameters are trained".format(*model.get_nb_trainable_parameters()))
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=args.learning_rate)
    model, optimizer, train_loader, prepared = accelerator.prepare(model, optimizer, train_loader, eval_loader)
    before = perplexity(model, prepared, accelerator.gather_for_metrics)
    batches = itertools.chain.from_iterable(itertools.repeat(train_loader))
    for step, ids in enumerate(itertools.islice(batches, args.max_train_steps), 1):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            accelerator.print(f"step {step}: loss {accelerator.gather(loss.detach()).mean().item():.4f}")
    after = perplexity(model, prepared, accelerator.gather_for_metrics)

    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:  # load the adapters as a reader of them would: with nothing but PEFT
        loaded = PeftModel.from_pretrained(base_model(args), args.output_dir).to(accelerator.device)
        batches = (ids.to(accelerator.device) for ids in eval_loader)
        reloaded = perplexity(loaded, batches, gather=lambda losses: losses)
        results = {"perplexity_before": before, "perplexity_after": after, "perplexity_reloaded": reloaded}
        Path(args.output_dir, "results.json").write_text(json.dumps({**results, "steps": step}, indent=2) + "\n")
        print(f"perplexity {before:.2f} before, {after:.2f} after, {reloaded:.2f} from {args.output_dir}")
        if abs(reloaded - after) > (1e-4 if accelerator.mixed_precision == "no" else 1e-2) * after:
            raise SystemExit("the saved adapters are not the trained ones")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
