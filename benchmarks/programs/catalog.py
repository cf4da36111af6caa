"""Which programs are run, and with what arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DRIVERS", "PROGRAMS", "Program"]

DRIVERS = Path(__file__).parent / "drivers"


@dataclass(frozen=True)
class Program:
    """A program, unchanged.

    Attributes:
        name: In the table.
        target: A module that is installed; or a file, in the folder of repositories, or one of `drivers`.
        args: Its arguments.
        needs: Packages without which it is left out.
        own: Parts of names of files that are not compared, as they are states in a format of this package.
        double: Run in double precision, as rounding in single grows past the tolerance.
    """

    name: str
    target: str
    args: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    double: bool = False

    @property
    def is_file(self) -> bool:
        """Whether it is a file in the folder of repositories."""
        return "/" in self.target


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _accelerate() -> list[Program]:
    features = {
        "automatic_gradient_accumulation": "",
        "checkpointing": "--checkpointing_steps epoch --output_dir out",
        "cross_validation": "--num_folds 2",
        "ddp_comm_hook": "--ddp_comm_hook fp16",
        "early_stopping": "",
        "gradient_accumulation": "--gradient_accumulation_steps 2",
        "gradient_accumulation_for_autoregressive_models": "--gradient_accumulation_steps 2 --per_device_batch_size 4",
        "local_sgd": "--local_sgd_steps 2",
        "memory": "",
        "multi_process_metrics": "",
        "profiler": "",
        "schedule_free": "",
        "tracking": "",
    }
    found = []
    for name, args in features.items():
        needs = ("schedulefree",) if name == "schedule_free" else ()
        target = f"accelerate/examples/by_feature/{name}.py"
        found.append(Program(f"accelerate {name}", target, _words(args), needs, own=("out/epoch_",)))
    resume = _words("--checkpointing_steps epoch --output_dir out")
    for name, args in (("nlp_example", ()), ("complete_nlp_example", resume)):
        found.append(Program(f"accelerate {name}", f"accelerate/examples/{name}.py", args, own=("out/epoch_",)))
    return found


_TRAINER = (
    "--output_dir out --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_steps 3 --logging_steps 1 "
    "--learning_rate 1e-2 --report_to none --use_cpu --disable_tqdm true --seed 7 "
)
_TRL = "--model_name_or_path ./model --bf16 false --gradient_checkpointing false " + _TRAINER
_EVALUATED = _TRL + "--eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 2 "
_SAMPLED = _TRL + "--dataset_name ./data/prompts --max_completion_length 6 --reward_funcs rewards.liked --beta 0.1 "
_LORA = "--use_peft --lora_r 4 --lora_target_modules all-linear --lora_dropout 0 "
_DISTILLED = "--dataset_name ./data/prompts --teacher_model_name_or_path ./teacher --max_completion_length 6 "


def _trl() -> list[Program]:
    scripts = {
        "sft": ("sft", _EVALUATED + "--dataset_name ./data/text --max_length 16"),
        "sft, packed": ("sft", _EVALUATED + "--dataset_name ./data/text --max_length 16 --packing"),
        "sft, completions": ("sft", _EVALUATED + "--dataset_name ./data/completions --max_length 16"),
        "sft, LoRA": ("sft", _EVALUATED + "--dataset_name ./data/text --max_length 16 " + _LORA),
        "sft, chunked loss": (
            "sft",
            _EVALUATED + "--dataset_name ./data/text --max_length 16 --loss_type chunked_nll",
        ),
        "dpo": ("dpo", _EVALUATED + "--dataset_name ./data/preferences"),
        "dpo, LoRA": ("dpo", _EVALUATED + "--dataset_name ./data/preferences " + _LORA),
        "kto": ("kto", _EVALUATED + "--dataset_name ./data/labelled"),
        "reward": ("reward", _EVALUATED.replace("./model", "./reward") + "--dataset_name ./data/ranked"),
        "grpo": ("grpo", _SAMPLED + "--num_generations 4"),
        "grpo, a group over replicas": ("grpo", _SAMPLED + "--num_generations 8 --gradient_accumulation_steps 2"),
        "grpo, generation_batch_size": ("grpo", _SAMPLED + "--num_generations 4 --generation_batch_size 16"),
        "grpo, LoRA": ("grpo", _SAMPLED + "--num_generations 4 " + _LORA),
        "rloo": ("rloo", _SAMPLED + "--num_generations 4"),
        "rloo, generation_batch_size": ("rloo", _SAMPLED + "--num_generations 4 --generation_batch_size 16"),
        "distillation": ("distillation", _TRL + _DISTILLED),
        "distillation, LoRA": ("distillation", _TRL + _DISTILLED + _LORA),
    }
    found = [Program(f"trl {n}", f"trl.scripts.{m}", _words(args), ("trl",)) for n, (m, args) in scripts.items()]
    examples = {
        "cpo": _EVALUATED + "--dataset_name ./data/preferences --max_length 24",
        "orpo": _EVALUATED + "--dataset_name ./data/preferences --max_length 24",
        "tpo": _EVALUATED + "--dataset_name ./data/triples",
        "gkd": _TRL + "--dataset_name ./data/chats --teacher_model_name_or_path ./teacher --max_new_tokens 6",
        "gold": (_TRL + "--dataset_name ./data/chats --max_completion_length 6 ").replace("./model", "./bytes")
        + "--teacher_model_name_or_path ./bytes-teacher",
        "online_dpo": _TRL
        + "--dataset_name ./data/prompts --reward_model_path ./reward --max_new_tokens 6 --dtype auto",
        "sdft": _TRL + "--dataset_name ./data/privileged --max_completion_length 6",
    }
    for name, args in examples.items():
        found.append(Program(f"trl experimental {name}", f"trl/examples/scripts/{name}.py", _words(args), ("trl",)))
    for folder, trainer in (("sdpo", "SDPO"), ("a2po", "A2PO"), ("gmpo", "GMPO"), ("iw_opd", "IWOPD")):
        # SDPO's loss is a mean of terms of either sign: 0.2 is left of them at the third step.
        double = folder == "sdpo"
        found.append(
            Program(f"trl experimental {folder}", "trl_experimental.py", (folder, trainer), ("trl",), double=double)
        )
    return found


def _transformers() -> list[Program]:
    args = _words(
        "--model_name_or_path ./model --train_file data/text/train.json --validation_file data/text/test.json "
        "--block_size 16 --per_device_train_batch_size 3 --per_device_eval_batch_size 3 --num_train_epochs 2 "
        "--learning_rate 1e-2 --gradient_accumulation_steps 2 --num_warmup_steps 2 --checkpointing_steps epoch "
        "--with_tracking --seed 7 --output_dir out"
    )
    target = "transformers/examples/pytorch/language-modeling/run_clm_no_trainer.py"
    return [Program("transformers run_clm_no_trainer", target, args, own=("out/epoch_",))]


def _sentence_transformers() -> list[Program]:
    needs = ("sentence_transformers",)
    kinds = (
        *("MultipleNegativesRankingLoss", "MultipleNegativesRankingLoss, gathered"),
        *("CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss, gathered"),
        *(
            "CoSENTLoss",
            "CoSENTLoss, evaluated",
            "MultipleNegativesSymmetricRankingLoss, gathered",
            "CachedGISTEmbedLoss, gathered",
        ),
    )
    found = [
        Program(f"sentence-transformers {kind}", "sentence_transformer.py", _words(kind.replace(",", "")), needs)
        for kind in kinds
    ]
    found.append(Program("sentence-transformers CrossEncoder", "cross_encoder.py", (), needs))
    found.append(Program("sentence-transformers SparseEncoder", "sparse_encoder.py", (), needs))
    return found


def _peft() -> list[Program]:
    prompts = "peft/examples/sequence_classification/peft_no_lora_accelerate.py"
    shared = "--num_virtual_tokens 4 --encoder_hidden_size 16 --per_device_train_batch_size 16 --num_train_epochs 1 "
    shared += "--model_name_or_path ./bert-base-cased --learning_rate 1e-2 --seed 7 --output_dir out --peft_type "
    found = [
        Program(f"peft peft_no_lora_accelerate, {kind}", prompts, _words(shared + kind))
        for kind in ("p_tuning", "prefix_tuning", "prompt_tuning")
    ]
    base = "--base_model ./model --data_path ./data/instructions --batch_size 4 --num_epochs 1 --cutoff_len 32 "
    base += "--val_set_size 4 --output_dir out --eval_step 2 --save_step 2 "
    more = {
        "olora_finetuning": base + "--device_map cpu --lora_r 4 --lora_dropout 0 --dtype float32 --seed 7",
        "shira_finetuning": base + "--device_map cpu --shira_r 4 --dtype float32 --seed 7",
    }
    for name, args in more.items():
        found.append(Program(f"peft {name}", f"peft/examples/{name}/{name}.py", _words(args)))
    return found


def _others() -> list[Program]:
    return [
        Program("setfit Trainer", "setfit_trainer.py", (), ("setfit",)),
        Program("lm-eval on a prepared model", "lm_eval_prepared.py", (), ("lm_eval",)),
    ]


PROGRAMS = [
    *_accelerate(),
    *_transformers(),
    *_trl(),
    *_sentence_transformers(),
    *_peft(),
    *_others(),
]
