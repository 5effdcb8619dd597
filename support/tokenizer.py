"""A checkpoint's tokenizer.json -> Tokenizer: byte-level BPE on tiktoken, and its chat template."""

import json
import os
import re
import unicodedata
from contextlib import suppress

import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support import UserError, foreign_file, read_json

# SmolLM2 cuts out single digits first, and splits the rest as GPT-2 does.
DIGITS_THEN_WORDS = (r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
                     r"|\s+(?![^\s\p{N}])|\s+")
NO_TOKEN = 2**31  # ids from here on stand for bytes that the vocabulary lacks
# A code point that Unicode keeps out of text. Put between the characters of a special token that a
# user typed, it hides the token from the search for special tokens.
GUARD = "\ufdd0"


class Tokenizer:
    """The tokenizer of a checkpoint directory (Qwen2.5, Qwen3, Llama 3, SmolLM2).

    stop_ids: where sampling stops. eos_id: the stop id that ends a turn in training. pad_id: never
    a stop id. bos_ids: what raw text begins with, if anything. template: None if there is none.
    """

    def __init__(self, path):
        data, ranks, pattern = _read_tokenizer_json(path)
        all_ranks = {bytes([b]): NO_TOKEN + b for b in range(256)} | ranks  # SmolLM2 lacks 21
        self.bpe = tiktoken.Encoding(
            "", pat_str=pattern, mergeable_ranks=all_ranks, special_tokens={})
        self.nfc = data.get("normalizer") is not None
        tokens = data.get("added_tokens", [])
        self.added = {token["content"]: token["id"] for token in tokens if token["content"]}
        self.special_ids = {token["id"] for token in tokens if token.get("special")}
        self.pieces = {i: piece for piece, i in ranks.items()}
        self.pieces |= {i: text.encode() for text, i in self.added.items()}
        longest_first = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.cut = re.compile("(" + ("|".join(longest_first) or "(?!)") + ")")

        files = (os.path.join(path, name) for name in (
            "config.json", "generation_config.json", "tokenizer_config.json"))
        config, generation, names = (read_json(f) if os.path.exists(f) else {} for f in files)
        rows, last = config.get("vocab_size"), max(self.pieces)
        if rows is not None and last >= rows:
            raise UserError(f"{path}: the tokenizer has ids up to {last}, but config.json says "
                            f"vocab_size = {rows}; use the tokenizer of this model")
        named = [names.get(key) or "" for key in ("bos_token", "eos_token", "pad_token")]
        bos, eos, pad = (t["content"] if isinstance(t, dict) else t for t in named)
        adds_bos = "TemplateProcessing" in json.dumps(data.get("post_processor"))  # as in Llama 3
        self.bos_ids = [self.added[bos]] if adds_bos and bos else []
        self.special_texts = {"bos_token": bos, "eos_token": eos}
        self.template = _chat_template(path, names)

        # Every end that a part of the checkpoint knows is a stop. Qwen2.5's base models name
        # <|endoftext|>, but their chat template ends a turn with <|im_end|>. To stop there is right
        # after a raw prompt, too: what would follow is the turn of somebody else.
        named = generation.get("eos_token_id")
        named = config.get("eos_token_id") if named is None else named
        ends = [self._turn_end(), self.added.get(eos)]
        ends += named if isinstance(named, list) else [named]
        ends = [i for i in ends if i is not None]
        if not ends or not all(type(i) is int and 0 <= i < 2**31 for i in [*ends, *self.pieces]):
            raise UserError(f"{path}: ids must be whole numbers, and eos_token_id (config.json or "
                            "generation_config.json) must be a token id or a list of them")
        self.stop_ids = frozenset(ends)
        self.eos_id = ends[0]
        candidates = [self.added.get(pad), *self.pieces]
        self.pad_id = next(i for i in candidates if i is not None and i not in self.stop_ids)

    def _turn_end(self):
        """The id of the added token with which the template ends an assistant's turn, or None."""
        answer = "TinyLoRA"
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        with suppress(UserError):  # where there is no template, or it refuses this conversation
            rendered = self.chat(turn, generation_prompt=False)
            end = self.cut.search(rendered.rpartition(answer)[2])
            return end and self.added[end.group()]

    def encode(self, text, special=False, guard=""):
        """Text -> list of ids, without a BOS. Special tokens that are spelled in the text stay text
        unless special=True; then `guard` is removed once they are cut out."""
        ids = []
        for part in self.cut.split(text) if special else [text]:
            if special and part in self.added:
                ids.append(self.added[part])
                continue
            part = part.replace(guard, "")
            if self.nfc:  # only now, as in the reference: a special token keeps its last character
                part = unicodedata.normalize("NFC", part)
            ids += [i for i in self.bpe.encode_ordinary(part) if i < NO_TOKEN]
        return ids

    def decode(self, ids, skip_special=False):
        """Ids -> text. Ids past the vocabulary are skipped; broken UTF-8 becomes U+FFFD."""
        skipped = self.special_ids if skip_special else ()
        pieces = [self.pieces.get(i, b"") for i in ids if i not in skipped]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def chat(self, messages, generation_prompt=True, **variables):
        """Render messages [{'role': ..., 'content': ...}] with the checkpoint's own template, in a
        jinja2 sandbox. variables: what else the template reads, as Llama 3's reads date_string."""
        if self.template is None:
            raise UserError("this checkpoint has no chat template")
        defaults = {"tools": None, "documents": None, "enable_thinking": False}  # Qwen3 may think
        variables = defaults | self.special_texts | variables
        with foreign_file("the chat template"):
            rendered = self.template.render(
                messages=messages, add_generation_prompt=generation_prompt, **variables)
        _check_contents(messages, rendered)
        return rendered

    def encode_chat(self, messages, generation_prompt=True, **variables):
        """Ids of the rendered chat. Special tokens that are typed in a message stay text."""
        rendered = self.chat(self._guarded(messages), generation_prompt, **variables)
        return self.encode(rendered, special=True, guard=GUARD)

    def encode_turns(self, messages):
        """Ids of a conversation up to the end of its last assistant turn, and for each id whether
        it is trained: the assistant's contents, each with the eos_id behind it, are. A turn is cut
        off before BPE where a sampler's prompt would end, so that what is trained is what is
        sampled: a line break that begins a content is not merged with the template's."""
        guarded = self._guarded(messages)
        ids, trained, done, tail = [], [], "", []  # tail: what the template puts behind the eos_id
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.chat(guarded[:i])
            turn = self.chat(guarded[: i + 1], generation_prompt=False)
            if not (prompt.startswith(done) and turn.startswith(prompt)):
                raise UserError("the chat template changes earlier messages, or ends a prompt with "
                                f"what it leaves out of a written turn (message {i + 1}), so that "
                                "turns cannot be told apart; use another checkpoint's template")
            asked = tail + self.encode(prompt[len(done) :], special=True, guard=GUARD)
            said = self.encode(turn[len(prompt) :], special=True, guard=GUARD)
            if self.eos_id not in said:
                raise UserError("the chat template ends a turn without a special token, so nothing "
                                "teaches the model to stop; use another checkpoint's template")
            end = said.index(self.eos_id) + 1
            ids += asked + said[:end]
            trained += [False] * len(asked) + [True] * end
            done, tail = turn, said[end:]
        return ids, trained

    def _guarded(self, messages):
        return [m | {"content": self.cut.sub(lambda t: GUARD.join(t[0]) + GUARD, m["content"])}
                for m in messages]


def _read_tokenizer_json(path):
    """The content of tokenizer.json, its vocabulary {bytes: id}, and its split pattern.

    The file lists which neighbours merge first; tiktoken merges any two that make a token, lowest
    id first. After BPE training the two agree if the merges make every token in the order of ids.
    (Llama 3 lists all ways to make a token. Its ignore_merges, whole words first, is tiktoken's.)
    """
    file = os.path.join(path, "tokenizer.json")
    if not os.path.exists(file):
        raise UserError(f"{file} is missing; have transformers write it: "
                        f"AutoTokenizer.from_pretrained({path!r}).save_pretrained({path!r})")
    data = read_json(file)
    match data:
        case {"model": {"type": "BPE", "vocab": vocab, "merges": merges},
              "pre_tokenizer": {"pretokenizers": [
                  {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                  {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}} if pattern:
            pass  # tiktoken panics if the pattern is empty
        case {"model": {"type": "BPE", "vocab": vocab, "merges": merges},
              "pre_tokenizer": {"pretokenizers": [
                  {"type": "Digits", "individual_digits": True},
                  {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}}:
            pattern = DIGITS_THEN_WORDS
        case _:
            raise UserError(f"{file}: only byte-level BPE behind one split pattern is supported "
                            "(Qwen, Llama 3, SmolLM2), not sentencepiece (Llama 2) or others")
    nfc = {"type": "NFC"}
    if data.get("normalizer") not in (None, nfc, {"type": "Sequence", "normalizers": [nfc]}):
        raise UserError(f"{file}: its normalizer is not supported; only NFC is")

    order = [vocab["".join(merge).replace(" ", "")] for merge in merges]  # of "a b" or ["a", "b"]
    made = set(order)
    added = {token["id"] for token in data.get("added_tokens", [])} - made
    # The vocabulary spells bytes in GPT-2's printable characters.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes(alphabet[c] for c in token): i for token, i in vocab.items() if i not in added}
    singles = {i for piece, i in ranks.items() if len(piece) == 1}
    if order != sorted(order) or len(ranks) != len(singles) + len(made):
        raise UserError(f"{file}: its merges do not make every token in the order of the ids, on "
                        "which tiktoken relies; use the tokenizer.json published with the model")
    return data, ranks, pattern


def _check_contents(messages, rendered):
    """UserError where the template left out what a message says. White space is not compared, as
    templates trim it. What is found is crossed out, so that it does not count for two messages."""
    rest = "".join(rendered.split())
    for number, message in sorted(enumerate(messages, 1), key=lambda m: -len(m[1]["content"])):
        content = "".join(message["content"].split())
        if content not in rest:
            raise UserError(f"the chat template leaves out message {number} ({message['role']}) or "
                            "a part of it, as reasoning up to </think>; change it, or the template")
        rest = rest.replace(content, "\0", 1)


def _chat_template(path, names):
    """The template of chat_template.jinja, else of tokenizer_config.json, compiled; else None."""
    text = names.get("chat_template")
    if isinstance(text, list):  # several, by name
        text = {entry["name"]: entry["template"] for entry in text}.get("default")
    file = os.path.join(path, "chat_template.jinja")
    if os.path.exists(file):
        with open(file, encoding="utf-8") as f:
            text = f.read()

    def refuse(message):
        raise UserError(f"the chat template refuses these messages: {message}")

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = refuse
    env.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False} | options)
    with foreign_file(f"{path}: the chat template"):
        # {% generation %} marks what other trainers train on; `with` renders its body alike.
        text = re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", text or "")
        return env.from_string(text) if text else None
