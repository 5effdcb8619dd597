"""tokenizer.json -> Tokenizer, byte-level BPE on tiktoken, and the chat templates of checkpoints."""

import base64
import json
import math
import os
import re
import unicodedata

import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support import UserError, foreign_file, read_json


def _byte_alphabet():
    """GPT-2's map from printable characters to bytes, in which vocab files spell their tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")  # how Qwen2 and Llama 3 cut text into words; they differ in how many digits stay together


def _read_vocabulary(path, extra):
    """The vocabulary of a directory, from tokenizer.json, vocab.json + merges.txt, or Llama-3's tokenizer.model.

    Returns ranks {bytes: id}, the word pattern, whether text is normalised to NFC, the added tokens
    [{content, id, special}] and whether raw text begins with a BOS.
    """
    file, vocab, model_file = (os.path.join(path, n) for n in ("tokenizer.json", "vocab.json", "tokenizer.model"))
    added = [t | {"id": int(i)} for i, t in extra.get("added_tokens_decoder", {}).items()]
    if os.path.exists(file) or not (os.path.exists(vocab) or os.path.exists(model_file)):
        data = read_json(file)
        bpe = data.get("model", {}) if isinstance(data, dict) else {}
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback"):
            raise UserError(f"{file}: only byte-level BPE tokenizers are supported")
        ranks = _byte_level_ranks(file, bpe.get("vocab"), bpe.get("merges"), bpe.get("ignore_merges"))
        normalizer = data.get("normalizer") or {"normalizers": []}
        steps = normalizer.get("normalizers", [normalizer])
        if any(step != {"type": "NFC"} for step in steps):
            raise UserError(f"{file}: its normalizer is not supported; NFC is")
        adds_bos = "TemplateProcessing" in json.dumps(data.get("post_processor"))  # Llama 3's
        return ranks, _split_pattern(file, data), bool(steps), data.get("added_tokens", []), adds_bos
    if os.path.exists(vocab):  # Qwen2
        with open(os.path.join(path, "merges.txt"), encoding="utf-8") as f:
            merges = f.read().split("\n")
        merges = [m.rstrip("\r") for m in merges[merges[0].startswith("#version") :] if m.strip()]
        return _byte_level_ranks(vocab, read_json(vocab), merges, False), WORDS % "", True, added, False
    try:  # Llama 3: a line of base64 and rank per token, as tiktoken has it
        with open(model_file, "rb") as f:
            ranks = {base64.b64decode(token): int(i) for token, i in map(bytes.split, f.read().splitlines())}
    except ValueError:
        raise UserError(f"{model_file} is no tiktoken file; Llama 2's sentencepiece is not supported") from None
    return ranks, WORDS % "{1,3}", False, added, True


def _byte_level_ranks(file, vocab, merges, ignore_merges):
    """{bytes: id} of a vocabulary spelled in GPT-2's characters. tiktoken merges by id, so the merges must come in the
    order of the ids they make (Llama 3 lists several merges a token, but looks whole words up first)."""
    alphabet = _byte_alphabet()
    try:
        ranks = {bytes(map(alphabet.__getitem__, token)): i for token, i in vocab.items()}
        order = [vocab[m.replace(" ", "") if isinstance(m, str) else m[0] + m[1]] for m in merges]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a byte-level BPE vocabulary with its merges ({error!r})") from None
    if not ignore_merges and any(a > b for a, b in zip(order, order[1:])):
        raise UserError(f"{file}: merges are not in the order of their ids, which tiktoken needs")
    return ranks


class Tokenizer:
    """Byte-level BPE on tiktoken.

    Text -> ids never recognises special tokens unless asked (special=True), so a question that spells <|im_end|>
    stays text. The order is the reference's: added tokens are cut out first, then NFC where the file asks for it.
    """

    def __init__(self, path):
        extra = read_optional(os.path.join(path, "tokenizer_config.json"))
        ranks, pattern, self.nfc, added, adds_bos = _read_vocabulary(path, extra)
        if len(set(ranks.values())) < len(ranks) or not all(bytes([b]) in ranks for b in range(256)) or not all(
                type(i) is int and 0 <= i < 2**31 for i in [*ranks.values(), *(t["id"] for t in added)]):
            raise UserError(f"{path}: its vocabulary lacks bytes, or its ids are no whole numbers, each used once")
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.added = {t["content"]: t["id"] for t in added if t["content"]}
        self.special_ids = {t["id"] for t in added if t.get("special")}
        self.pieces = {i: token for token, i in ranks.items()} | {i: t.encode() for t, i in self.added.items()}
        rows = read_optional(os.path.join(path, "config.json")).get("vocab_size", math.inf)
        if max(self.pieces) >= rows:
            raise UserError(f"{path}: the tokenizer has ids up to {max(self.pieces)}, but config.json says "
                            f"vocab_size = {rows}; use the tokenizer that belongs to this model")
        self.cut = re.compile("|".join(re.escape(t) for t in sorted(self.added, key=len, reverse=True)) or r"(?!)")
        self.bos_ids = [self.added[_token_text(extra["bos_token"])]] if adds_bos and extra.get("bos_token") else []
        self.special_texts = {k: _token_text(extra.get(k)) or "" for k in ("bos_token", "eos_token")}
        self._eos = self.added.get(_token_text(extra.get("eos_token")))
        self.stop_ids = self._stop_ids(path)
        self.eos_id = self._eos if self._eos in self.stop_ids else min(self.stop_ids)  # what ends a turn in training
        self.pad_id = self._pad_id(extra)
        self.template = _chat_template(path, extra)

    def _stop_ids(self, path):
        """eos_token_id of generation_config.json, else of config.json, else the tokenizer's eos_token: a set of ids.

        Nothing else is read there: its temperature, top_p and repetition_penalty would change the sampled policy.
        """
        for name in ("generation_config.json", "config.json"):
            stop = read_optional(os.path.join(path, name)).get("eos_token_id")
            if stop is not None:
                stop = stop if isinstance(stop, list) else [stop]
                if not stop or not all(type(i) is int and 0 <= i < 2**31 for i in stop):
                    raise UserError(f"{os.path.join(path, name)}: eos_token_id must be a token id or a list of them")
                return frozenset(stop)
        if self._eos is None:
            raise UserError(f"{path}: no stop token is named (eos_token_id in generation_config.json or config.json)")
        return frozenset([self._eos])

    def _pad_id(self, extra):
        """The file's pad token if it is no stop id, else any id that is none. Padding is masked: its value is inert."""
        pad = self.added.get(_token_text(extra.get("pad_token")))
        return pad if pad is not None and pad not in self.stop_ids else next(
            i for i in range(len(self.pieces)) if i not in self.stop_ids)

    def encode(self, text, special=False):
        """Text -> list of ids. special=True recognises added tokens such as <|im_start|>; no BOS is put in front."""
        return self._encode_cut(text) if special else self._encode_plain(text)

    def _encode_cut(self, text, guard=None):
        ids, last = [], 0
        for match in self.cut.finditer(text):
            ids += self._encode_plain(text[last : match.start()], guard)
            ids.append(self.added[match.group()])
            last = match.end()
        return ids + self._encode_plain(text[last:], guard)

    def _encode_plain(self, text, guard=None):
        if guard:
            text = text.replace(guard, "")
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return self.bpe.encode_ordinary(text)

    def decode(self, ids, skip_special=False):
        """Ids -> text. Ids past the vocabulary (padded embedding rows) are skipped; broken UTF-8 becomes U+FFFD."""
        skip = self.special_ids if skip_special else ()
        return b"".join(self.pieces.get(i, b"") for i in ids if i not in skip).decode("utf-8", errors="replace")

    def chat(self, messages, generation_prompt=True, **variables):
        """Render messages [{'role': ..., 'content': ...}] with the checkpoint's own template (a jinja2 sandbox).

        variables: what else the template reads, e.g. date_string (Llama 3; a fixed date unless given).
        """
        if self.template is None:
            raise UserError("this checkpoint has no chat template")
        with foreign_file("the chat template"):
            return self.template.render(messages=messages, add_generation_prompt=generation_prompt,
                                        **{"tools": None, "documents": None} | self.special_texts | variables)

    def encode_chat(self, messages, generation_prompt=True, **variables):
        """Ids of the rendered chat, where the special tokens are the template's: those a user typed stay text."""
        return self._encode_cut(self.chat(self._guarded(messages), generation_prompt, **variables), GUARD)

    def encode_turns(self, messages):
        """Ids of a whole conversation up to the end of its last assistant turn, and for each of them whether the
        assistant is to say it: the content of all its turns, and the token that ends a turn.

        Every turn is cut off before BPE where a sampler's prompt would end, so what is trained is what is sampled: a
        content that begins with a line break is not merged with the template's. UserError where the template renders
        the messages so far differently once more follow, or ends a turn without a special token.
        """
        guarded, ids, trained, done = self._guarded(messages), [], [], ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, turn = self.chat(guarded[:i]), self.chat(guarded[: i + 1], generation_prompt=False)
                if not (prompt.startswith(done) and turn.startswith(prompt)):
                    raise UserError("the chat template changes earlier messages when later ones follow, so that turns "
                                    f"cannot be told apart (at message {i + 1}); use another checkpoint's template")
                said = self._encode_cut(turn[len(prompt) :], GUARD)
                end = next((n for n in range(len(said), 0, -1) if said[n - 1] in self.added.values()), None)
                if end is None:
                    raise UserError("the chat template ends an assistant's turn without a special token: nothing would "
                                    "teach the model to stop; use another checkpoint's template")
                asked = self._encode_cut(prompt[len(done) :], GUARD)
                ids += asked + said
                trained += [False] * len(asked) + [True] * end + [False] * (len(said) - end)
                done = turn
        last = len(trained) - trained[::-1].index(True)
        return ids[:last], trained[:last]

    def _guarded(self, messages):
        return [m | {"content": self.cut.sub(lambda match: GUARD.join(match[0]) + GUARD, m["content"])}
                for m in messages]


GUARD = "\ufdd0"  # a code point that Unicode keeps out of text: put into a typed <|im_end|>, it hides it from `cut`


def read_optional(file):
    data = read_json(file) if os.path.exists(file) else {}
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a JSON object")
    return data


def _token_text(token):
    return token["content"] if isinstance(token, dict) else token


def _split_pattern(file, data):
    """The regex that cuts text into words before BPE, from tokenizer.json's pre_tokenizer."""
    match (data.get("pre_tokenizer") or {}).get("pretokenizers"):
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern
    raise UserError(f"{file}: its pre_tokenizer is not one split pattern and ByteLevel: no Qwen2 or Llama-3 tokenizer")


def _chat_template(path, extra):
    text = extra.get("chat_template")
    if isinstance(text, list):  # several, by name
        text = next((t.get("template") for t in text if t.get("name") == "default"), None)
    file = os.path.join(path, "chat_template.jinja")
    if os.path.exists(file):
        with open(file, encoding="utf-8") as f:
            text = f.read()
    if not isinstance(text, str):
        return None

    def raise_exception(message):
        raise UserError(f"the chat template refuses these messages: {message}")

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False} | options)
    with foreign_file(f"{path}: the chat template"):
        return env.from_string(text)
