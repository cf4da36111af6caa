"""An Accelerate script as its documentation shows one. It has never heard of tensor parallelism."""

import argparse
import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, get_scheduler

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", required=True)
parser.add_argument("--tp_size", help="an argument of the script's own")
parser.add_argument("-m", help="and another")
parser.add_argument("rest", nargs="*")
args = parser.parse_args()

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
config = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = AutoModelForCausalLM.from_config(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=20)
loader = DataLoader(torch.randint(0, 97, (22, 8)), batch_size=4, shuffle=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
losses, norms, rates = [], [], []
for _ in range(2):
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather_for_metrics(loss.detach().repeat(len(ids))).mean().item())
        rates.append(scheduler.get_last_lr()[0])
accelerator.wait_for_everyone()
unwrapped = accelerator.unwrap_model(model)
unwrapped.save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
if accelerator.is_main_process:
    with open(f"{args.output_dir}/run.json", "w") as file:
        json.dump(
            {"losses": losses, "norms": norms, "rates": rates, "tp": args.tp_size, "m": args.m, "rest": args.rest},
            file,
        )
