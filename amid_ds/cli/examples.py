"""The lines that each command's `--help` ends with; a test parses all of them."""

from __future__ import annotations

from collections.abc import Mapping

# By command: (line, what it does).
EXAMPLES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("amid-ds demo", "the whole job in minutes, on two CPU cores and without a network"),
        ("amid-ds recipes new distil.yaml", "answer five questions, get a recipe"),
        ("deepspeed --num_gpus 8 --module amid_ds train distil.yaml", "distil on eight GPUs")),
    "train": (
        ("amid-ds train distil.yaml", "in one process; the same line resumes"),
        ("deepspeed --num_gpus 8 --module amid_ds train distil.yaml", "on eight GPUs"),
        ("torchrun --nproc-per-node 8 -m amid_ds train distil.yaml", "the same by torchrun"),
        ("amid-ds train distil.yaml train.learning_rate=2e-4 output_dir=runs/faster",
         "other values than the recipe's")),
    "plan": (
        ("amid-ds plan distil.yaml --nodes 2 --ranks-per-node 8 --device h100-80g",
         "does it fit on sixteen GPUs, and how long does it take?"),
        ("amid-ds plan distil.yaml --json train.seq_length=4096", "for a script, longer rows"),
        ("amid-ds plan distil.yaml --cache --topk 64", "the size of the teacher written down"),
        ("amid-ds plan --check runs/distil", "what a past run really took")),
    "prepare": (
        ("amid-ds prepare distil.yaml", "once, before jobs that wait for it"),
        ("amid-ds prepare distil.yaml data.workers=16", "with more processes")),
    "tokenizer": (
        ("amid-ds tokenizer train distil.yaml models/tokenizer --vocab-size 32000",
         "on the recipe's data"),
        ("amid-ds tokenizer train distil.yaml models/tokenizer --megabytes 2000",
         "on two gigabytes of it")),
    "demo": (
        ("amid-ds demo", "into runs/demo"),
        ("amid-ds demo --out /tmp/demo --seed 1", "elsewhere, with other random numbers")),
    "study": (
        ("amid-ds study", "what α does, three seeds"),
        ("amid-ds study cached --seeds 1", "what a student learns from a cache"),
        ("amid-ds study pruning --out runs/pruning", "is a pruned student the better start?")),
    "recipes": (
        ("amid-ds recipes", "what comes with the package"),
        ("amid-ds recipes copy gkd", "one of them as gkd.yaml, to change"),
        ("amid-ds recipes new distil.yaml", "one of your own, by five questions"),
        ("amid-ds recipes schema", "for an editor that completes and checks recipes")),
    "recipes list": (("amid-ds recipes list", "names, and what each is"),),
    "recipes copy": (
        ("amid-ds recipes copy gkd", "to gkd.yaml"),
        ("amid-ds recipes copy amid_gpt2_dolly mine/amid.yaml", "to another place")),
    "recipes new": (
        ("amid-ds recipes new", "asks, and writes distil.yaml"),
        ("amid-ds recipes new mine/small.yaml", "to another place")),
    "recipes schema": (
        ("amid-ds recipes schema", "on stdout; add > recipe.schema.json to keep it"),),
    "eval": (
        ("amid-ds eval models/small --data heldout.jsonl", "perplexity, ROUGE-L of answers"),
        ("amid-ds eval models/small --teacher models/large --data heldout.jsonl --json",
         "and the distance from its teacher, for a script"),
        ("amid-ds eval runs/gkd/best --data dolly.jsonl --protocol minillm",
         "by a published protocol"),
        ("amid-ds eval models/small --tasks arc_easy,hellaswag", "benchmarks")),
    "tasks": (("amid-ds tasks runs/distil", "after a run, what its checkpoints still wait for"),),
    "chat": (
        ("amid-ds chat runs/distil", "talk to a finished run"),
        ("amid-ds chat models/small --beside models/large --temperature 0",
         "student and teacher side by side")),
    "generate": (
        ("amid-ds generate models/large --prompts prompts.jsonl --out answers.jsonl",
         "a model's answers to a file's prompts"),
        ("amid-ds generate distil.yaml --out answers.jsonl --temperature 0",
         "the recipe's teacher, its most probable answers")),
    "cache": (
        ("amid-ds cache distil.yaml --topk 64 --out caches/web", "64 ids of each position"),
        ("amid-ds cache distil.yaml --sample 32", "32 draws instead, beside the data")),
    "prune": (
        ("amid-ds prune models/large models/small --layers 16 --data corpus.jsonl",
         "16 layers, those that do most on this text"),
        ("amid-ds prune models/large models/small --layers 8 --by depth",
         "8 layers at even distances")),
    "dequantize": (
        ("amid-ds dequantize models/fp8 models/large", "an ordinary folder, in bf16"),
        ("amid-ds dequantize models/fp8 models/large --dtype fp32", "in fp32")),
    "checkpoints": (("amid-ds checkpoints runs/distil", "each with a verdict"),),
    "export": (
        ("amid-ds export runs/distil models/distilled", "the newest checkpoint"),
        ("amid-ds export runs/distil models/early --step 500 --dtype bf16", "an earlier one"),
        ("amid-ds export runs/lora models/merged --merge", "adapters merged into their model"),
        ("amid-ds export runs/text models/whole --into models/multimodal",
         "back into the multimodal folder")),
    "push": (
        ("amid-ds push runs/distil owner/distilled --dry-run", "what would go to the hub"),
        ("amid-ds push models/small owner/small --private --license apache-2.0",
         "a folder, for you alone")),
    "submit": (
        ("amid-ds submit distil.yaml --nodes 2 --ranks-per-node 8 --time 24:00:00",
         "check, render, sbatch"),
        ("amid-ds submit distil.yaml --nodes 2 --dry-run", "only print the script"),
        ("amid-ds submit distil.yaml --template cache --jobs 16 --topk 64",
         "sixteen jobs that write one cache")),
    "sweep": (
        ("amid-ds sweep distil.yaml loss.alpha=-5,-3,-1 loss.lam=0.1,0.5", "six runs, here"),
        ("amid-ds sweep distil.yaml loss.lam=0.1,0.5 --slurm --ranks-per-node 8",
         "as an array of jobs"),
        ("amid-ds sweep runs/distil", "the table of a sweep again")),
    "chain": (
        ("amid-ds chain assistants.yaml", "each student the next one's teacher"),
        ("amid-ds chain assistants.yaml --slurm --ranks-per-node 8", "a job for each link")),
    "reproduce": (
        ("amid-ds reproduce amid --models models --data data", "a published row, beside ours"),
        ("amid-ds reproduce gkd --models models --data data --ranks-per-node 4",
         "on four ranks")),
    "status": (
        ("amid-ds status", "all runs under ./runs"),
        ("amid-ds status runs/distil", "one run")),
    "report": (
        ("amid-ds report runs/distil", "report.html"),
        ("amid-ds report runs/a runs/b -o compared.html", "two runs side by side"),
        ("amid-ds report runs/distil --picture runs.png", "and a picture, for a README")),
    "doctor": (
        ("amid-ds doctor", "this machine"),
        ("srun --nodes 2 --ntasks-per-node 8 amid-ds doctor distil.yaml",
         "two nodes, their network, and the recipe")),
    "requeue": (
        ("amid-ds requeue 75 distil.yaml", "as the templates of slurm/ call it"),),
    "bench": (
        ("amid-ds bench loss", "the fused loss beside the naive one"),
        ("amid-ds bench loss --predict h100-80g --tokens 8192 --vocabulary 128256",
         "a device that is not here"),
        ("amid-ds bench step --rows 8 --length 1024", "a step beside its parts")),
    "completion": (
        ("amid-ds completion bash", "on stdout; source <(amid-ds completion bash) turns it on"),
        ("amid-ds completion fish", "for ~/.config/fish/completions/amid-ds.fish")),
}
