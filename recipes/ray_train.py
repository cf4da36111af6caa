# 4 workers on CPU, tensor parallelism 2 x data parallelism 2 (no network):
#   python recipes/ray_train.py --num_workers 4 --tp_size 2
# On GPUs, one for each worker:
#   python recipes/ray_train.py --num_workers 16 --tp_size 8 --use_gpu
"""Ray Train: `TorchTrainer` starts the workers and their process group, and Accelerate finds it.

Ray places workers with neighbouring ranks on one node, so the ranks of a replica are together as long as `tp_size`
divides the workers of a node. `pip install "ray[train]"`.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from accel_tp_ddp import TensorParallelDDPPlugin


def parse_args():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--tp_size", type=int, default=2)
    parser.add_argument("--use_gpu", action="store_true")
    parser.add_argument("--output_dir", default="outputs/ray_train", help="seen by every node")
    return parser.parse_args()


def train(options):
    """What each worker runs: an Accelerate loop as it is anywhere."""
    set_seed(0)
    accelerator = Accelerator(
        cpu=not options["use_gpu"], parallelism_config=TensorParallelDDPPlugin(tp_size=options["tp_size"])
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=131, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(torch.randint(0, 131, (64, 32)), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for ids in loader:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    accelerator.save_model(model, options["output_dir"])
    if accelerator.is_main_process:
        Path(options["output_dir"], "losses.json").write_text(json.dumps(losses))
        print(f"{accelerator.num_processes} replicas; losses {losses[0]:.6f} to {losses[-1]:.6f}")
    accelerator.wait_for_everyone()


def main():
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    args = parse_args()
    options = {"tp_size": args.tp_size, "use_gpu": args.use_gpu, "output_dir": str(Path(args.output_dir).resolve())}
    trainer = TorchTrainer(
        train,
        train_loop_config=options,
        torch_config=TorchConfig(backend="nccl" if args.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=args.num_workers,
            use_gpu=args.use_gpu,
            # Ray waits for as many cores as its workers ask for; on the CPU they share what there is.
            resources_per_worker=None if args.use_gpu else {"CPU": 1 / args.num_workers},
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
