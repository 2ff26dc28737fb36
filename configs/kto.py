"""KTO on single answers, each desirable or not, of the data that configs/dpo.py has as pairs.

Data:      python scripts/make_preferences.py --output=runs/preferences
Command:   python -m ringbpt.train --config=configs/kto.py
Hardware:  two CPU cores; nothing is downloaded
Expected:  from 50 % of the held-out answers on their side of the KL to 99 % in 150 steps, two minutes; the loss begins
           at 0.5. A lower rate than DPO's, and the data's own order: an answer is learnt beside its counterpart.
"""

from ml_collections import ConfigDict

from ringbpt.config import load_recipe


def get_config() -> ConfigDict:
    config = load_recipe("configs/dpo.py")
    config.objective = "kto"
    config.preference.beta = 0.3
    for dataset, file in ((config.train_dataset, "answers"), (config.eval_dataset, "answers_held_out")):
        dataset.json_dataset.path = f"runs/preferences/{file}.jsonl"
    config.train_dataset.shuffle = False
    config.optimizer.adamw_optimizer.lr = 5e-4
    return config
