"""A training run: what it keeps in its out_dir, and how it stops and resumes.

    log.jsonl               a line for each step, and one for each evaluation
    checkpoint.safetensors  all that resuming needs: trained numbers, optimiser, step, history
    settings.py             a config file that repeats the run

The checkpoint is written under another name and renamed, and it records how long the log was. So a
run that is killed at any moment resumes from its last checkpoint, to the same numbers and log.
"""

import atexit
import fcntl
import json
import os
import signal
import time
from dataclasses import asdict
from glob import glob
from itertools import count

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support import UserError, whole_file
from support.adapter_file import same_base
from support.parallel import full_tensor, is_chief, print0, spread_like


class Run:
    def __init__(self, cfg, ranks, parameters, optimizer, identity):
        """parameters: {name: parameter} that the optimizer trains. identity: the settings without
        which these numbers would mean something else; a checkpoint with others is refused."""
        self.cfg, self.ranks = cfg, ranks
        self.parameters, self.optimizer = parameters, optimizer
        self.identity = identity | {"code of the config": cfg.code}
        self.settings = asdict(cfg)  # that a resumed run is expected to share
        for key in ("init_from", "max_steps", "out_dir"):
            del self.settings[key]
        self.name = os.path.basename(os.path.normpath(cfg.out_dir))
        self.log_path = os.path.join(cfg.out_dir, "log.jsonl")
        self.checkpoint = os.path.join(cfg.out_dir, "checkpoint.safetensors")
        self.step = 0  # where the run begins
        self.saved_step = None  # the step of the checkpoint on disk
        self.history = {"first": {}, "last": {}, "best": None, "evaluated": None, "seconds": 0.0,
                        "log_bytes": 0, "test set": [cfg.eval_dataset, cfg.eval_size]}
        if cfg.init_from == "resume":
            self.resume()
        self.began = time.time() - self.history["seconds"]
        if is_chief():
            self.lock = claim(cfg.out_dir, "log.jsonl", fresh=cfg.init_from == "scratch")
            with open(self.log_path, "a") as f:  # without the steps that will be repeated
                f.truncate(min(f.tell(), self.history["log_bytes"]))
            self.wandb = self.open_wandb() if cfg.wandb_log else None
        self.signal, self.signalled_at = 0, 0.0
        self.old_handlers = {number: signal.signal(number, self.on_signal)
                             for number in (signal.SIGINT, signal.SIGTERM)}

    def open_wandb(self):
        import wandb  # only here: nothing else needs it

        return wandb.init(project="tinylora", name=self.name, dir=self.cfg.out_dir,
                          config=asdict(self.cfg))

    # --- when to evaluate, to save and to stop

    def evaluation_due(self, step):
        return self.history["evaluated"] != step and self.due(step, self.cfg.eval_interval)

    def save_due(self, step):
        return self.saved_step != step and self.due(step, self.cfg.save_interval)

    def due(self, step, interval):
        """Before the first step, after the last one, and every `interval` steps."""
        return step in (0, self.cfg.max_steps) or interval > 0 and step % interval == 0

    def on_signal(self, number, frame):
        """Ctrl-C and SIGTERM stop the run after the current step; a second one stops it at once."""
        if not self.signal:
            self.signal, self.signalled_at = number, time.time()
            os.write(2, b"\nstopping after this step; press again to stop without saving\n")
        elif time.time() - self.signalled_at > 1:  # torchrun passes on the first one a second time
            raise SystemExit(128 + number)

    def stop_asked(self):
        """Has any process had a signal? All of them get the same answer and stop together."""
        stop = self.ranks.max(self.signal > 0)  # a signal during this call counts in the next one
        if stop:
            self.signal = self.signal or signal.SIGINT
        return stop

    # --- what is written

    def log(self, step, record):
        if is_chief():
            with open(self.log_path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step} | record) + "\n")
            if self.wandb:
                self.wandb.log(record, step=step)

    def log_evaluation(self, step, figures, score):
        """Log figures of an evaluation. Returns whether training has improved on the best score."""
        self.log(step, {"eval": figures})
        self.saved_step = None  # a checkpoint of this step, from before a resume, lacks these
        self.history |= {"first": self.history["first"] or figures, "last": figures,
                         "evaluated": step}
        best = self.history["best"]
        self.history["best"] = score if best is None else max(best, score)
        return best is not None and score > best

    def save(self, step):
        """Write the checkpoint. All processes call this, since each may hold a part."""
        tensors = {}
        for name, p in self.parameters.items():
            for kind, t in ({"weights": p} | self.optimizer.state[p]).items():
                tensors[f"{kind}/{name}"] = full_tensor(t)
        self.saved_step = step
        if not is_chief():
            return
        with open(self.log_path, "a") as f:
            os.fsync(f.fileno())
            self.history["log_bytes"] = f.tell()
        self.history["seconds"] = time.time() - self.began
        info = {"step": step, "history": self.history, "identity": self.identity,
                "settings": self.settings}
        with whole_file(self.checkpoint) as aside:
            save_file(tensors, aside, {key: json.dumps(value) for key, value in info.items()})

    def resume(self):
        started = os.path.exists(os.path.join(self.cfg.out_dir, "settings.py"))
        if started and not os.path.exists(self.checkpoint):
            return print0(f"{self.cfg.out_dir} has no checkpoint yet: this starts at step 0")
        try:
            with safe_open(self.checkpoint, framework="pt") as f:
                info = {key: json.loads(value) for key, value in f.metadata().items()}
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot resume from {self.checkpoint}: {error}; leave out init_from "
                            "to start anew") from None
        # Earlier checkpoints of method full do not say which weights they train: it was all.
        if different := changes({"targets": "all"} | info["identity"], self.identity):
            raise UserError(f"cannot resume: {self.checkpoint} was made with another {different}; "
                            f"repeat its settings with {self.cfg.out_dir}/settings.py, or start "
                            "anew")
        if different := changes(info["settings"], self.settings):
            print0(f"note: the run goes on with another {different}")
        self.step = self.saved_step = info["step"]
        saved = info["history"]
        if saved["test set"] == self.history["test set"]:  # else scores cannot be compared
            self.history = saved
        self.history |= {"seconds": saved["seconds"], "log_bytes": saved["log_bytes"]}
        for key, t in tensors.items():
            kind, _, name = key.partition("/")
            p = self.parameters[name]
            if kind == "weights":
                p.data.copy_(spread_like(p, t))
            else:
                self.optimizer.state[p][kind] = spread_like(p, t)

    def close(self, label, what):
        """Print the last line. A run that was stopped exits with the code of its signal."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        first, last = self.history["first"], self.history["last"]
        if last:
            seconds = time.time() - self.began
            key = "reward" if "reward" in last else "loss"
            before = "" if first is last else f"{first[key]:.3f} -> "
            print0(f"{self.name}: {label} {before}{last[key]:.3f} with {what} in {seconds:.0f} s")
        if self.signal:
            print0(f"stopped: go on with --out_dir={self.cfg.out_dir} --init_from=resume")
        if is_chief():
            self.lock.close()
        self.ranks.leave()
        if self.signal:
            raise SystemExit(128 + self.signal)


def claim(out_dir, evidence, fresh):
    """Make out_dir and lock it: other runs are kept out while the file that this returns is open.
    A fresh run moves a directory that holds the file `evidence` aside, so nothing is overwritten."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = open(os.path.join(out_dir, ".lock"), "w")
        atexit.register(lock.close)  # also if the run fails
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A killed run may leave what it was writing: whole_file's *.tmp and safetensors' .tmp*.
        for pattern in ("*.tmp", ".tmp*", "model/*.tmp", "model/.tmp*", "best/*.tmp", "best/.tmp*"):
            for name in glob(pattern, root_dir=out_dir):
                os.remove(os.path.join(out_dir, name))
        if not fresh or not os.path.exists(os.path.join(out_dir, evidence)):
            return lock
        names = (f"{os.path.normpath(out_dir)}.{i}" for i in count(1))
        aside = next(name for name in names if not os.path.exists(name))
        os.rename(out_dir, aside)
    except BlockingIOError:
        raise UserError(f"another run is writing to out_dir '{out_dir}'; wait for it, or choose "
                        "another") from None
    except OSError as error:
        raise UserError(f"out_dir '{out_dir}' cannot be written: {error}") from None
    print(f"moved the earlier run in {out_dir} to {aside}")
    with lock:
        return claim(out_dir, evidence, fresh)


def changes(before, now):
    """Which settings differ. The base model's fingerprint may differ a little: rounding moves it."""
    different = [key for key in now if before.get(key) != now[key]]
    if "base" in different and same_base(before.get("base"), now["base"]):
        different.remove("base")
    return ", ".join(different)
