"""support/tokenizer.py: ids and chats equal those of transformers and of the published vectors, sampling stops where a
turn ends, and what would be read wrongly is refused in one line."""

import gzip
import json
import shutil

import hypothesis
import pytest
import tokenizers
from conftest import ROOT, SHARED, changed, refusal
from hypothesis import strategies as st

import model
import sample

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here (requirements-dev.txt)")


def with_template(source, path, template, **files):
    return model.load_tokenizer(changed(source, path, {"chat_template.jinja": template, **files}))


def real_tokenizer(family, path, suffix=""):
    """The Tokenizer of the real vocabulary files in ../shared, or a skip."""
    source = SHARED / "tokenizers" / family
    if not source.exists():
        pytest.skip("needs the real vocabularies in ../shared/tokenizers")
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    version = "" if family == "qwen2.5" else ".3.1"
    shutil.copy(source / f"tokenizer_config{suffix or version}.json", path / "tokenizer_config.json")
    shutil.copy(source / f"generation_config{version}.json", path / "generation_config.json")
    return model.load_tokenizer(str(path))


def turns(*contents, system=None):
    """A conversation that a user begins."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ["user", "assistant"] * len(contents)
    return messages + [{"role": role, "content": content} for role, content in zip(roles, contents)]


# ------------------------------------------------------------------------------------------------------- text and ids


def test_ids_and_text_equal_those_of_the_reference_library(checkpoint, tokenizer):
    reference = transformers.AutoTokenizer.from_pretrained(checkpoint)
    texts = ["Tom has 12 apples.", "", "  two  spaces\n\n\tand tabs ", "naïve e\u0301 日本語 🙂 12345", "it's I'LL",
             "<|im_end|>\u0338 <|im_start|>user", "\x00\x01 \u2028 \u00a0"]
    for text in texts:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, special=True) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids), text


@pytest.mark.parametrize("family, bos, eos", [
    ("qwen2.5", [], "<|im_end|>"),
    ("llama3", ["<|begin_of_text|>"], "<|eot_id|>"),
])
def test_real_vocabularies_give_the_published_ids(family, bos, eos, tmp_path):
    ours = real_tokenizer(family, tmp_path)
    assert ours.decode([ours.eos_id]) == eos and [ours.decode([i]) for i in ours.bos_ids] == bos
    for name in (family, f"llamacpp_{family}"):
        lines = (SHARED / "tokenizers" / f"vectors_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for case in map(json.loads, lines):
            if "text" in case:
                assert ours.encode(case["text"], special=True) == case["ids"]
            if "ids_plain" in case:
                assert ours.encode(case["text"]) == case["ids_plain"]
            if "decoded" in case:
                assert ours.decode(case["ids"]) == case["decoded"]
                assert ours.decode(case["ids"], skip_special=True) == case["decoded_skip"]
            if "rendered" in case:
                rendered = ours.chat(case["messages"], case["add_generation_prompt"], **case["kwargs"])
                assert rendered == case["rendered"] and ours.encode(rendered, special=True) == case["ids"]


@pytest.mark.parametrize("family", ["qwen2.5", "llama3"])
def test_random_unicode_gives_the_ids_of_the_reference_library(family, tmp_path):
    ours = real_tokenizer(family, tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assigned = st.characters(exclude_categories=("Cs", "Cn", "Mn"))  # of marks the libraries' Unicode tables differ

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(st.text(st.one_of(assigned, st.sampled_from(" \n\t0123456789'abc<|im_end|>")), max_size=60))
    def check(text):
        assert ours.encode(text, special=True) == reference(text, add_special_tokens=False)["input_ids"]

    check()


def test_ids_past_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([10**6, *tokenizer.encode("ab"), 511]) == "ab"


def test_text_begins_with_a_bos_where_the_files_ask_for_it(checkpoint, tmp_path):
    begin = "<|im_start|>"
    processor = {"type": "Sequence", "processors": [{"type": "TemplateProcessing"}]}
    named = changed(checkpoint, tmp_path / "named", {"tokenizer_config.json": {"bos_token": begin}})
    asked = changed(checkpoint, tmp_path / "asked", {
        "tokenizer_config.json": {"bos_token": {"content": begin}}, "tokenizer.json": {"post_processor": processor}})
    assert model.load_tokenizer(named).bos_ids == []
    asked = model.load_tokenizer(asked)
    assert asked.bos_ids == [asked.added[begin]]


# ------------------------------------------------------------------------------------------- what is refused, and how

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
NFC = {"type": "NFC"}


def splits(*steps):
    steps = [*({**SPLIT, "pattern": {"Regex": step}} if isinstance(step, str) else step for step in steps)]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


@pytest.mark.parametrize("file, change, words", [
    ("tokenizer.json", None, "tokenizer.json is missing; have transformers write it"),
    ("tokenizer.json", "[]", "only byte-level BPE"),
    ("tokenizer.json", '{"a":' * 100_000, "is malformed (RecursionError"),
    ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "only byte-level BPE"),
    ("tokenizer.json", {"pre_tokenizer": None}, "not sentencepiece"),  # as in Llama 2
    # tiktoken drops what its one pattern leaves over, so that several steps would lose text (DeepSeek has several)
    ("tokenizer.json", splits("[\r\n]", "[A-Za-z]+", BYTES), "behind one split pattern"),
    ("tokenizer.json", splits("", BYTES), "behind one split pattern"),  # on which tiktoken panics
    ("tokenizer.json", splits("x|.", BYTES | {"add_prefix_space": True}), "behind one split pattern"),
    ("tokenizer.json", splits("x|.", BYTES | {"use_regex": True}), "behind one split pattern"),
    ("tokenizer.json", splits("", BYTES), "behind one split pattern"),
    ("tokenizer.json", splits(SPLIT | {"pattern": {"Regex": "x|."}, "behavior": "Removed"}, BYTES), "split pattern"),
    ("tokenizer.json", {"normalizer": {"type": "NFKC"}}, "normalizer is not supported"),
    ("tokenizer.json", {"normalizer": {"type": "Sequence", "normalizers": [NFC, {"type": "Lowercase"}]}}, "normalizer"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}, "is malformed (KeyError"),
    ("tokenizer.json", {"added_tokens": [{"content": "<a>", "id": -1}]}, "ids must be whole numbers"),
    ("tokenizer_config.json", "[]", "is malformed (AttributeError"),
    ("generation_config.json", "[]", "is malformed (AttributeError"),
    ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id (config.json or generation_config.json) must be"),
    ("chat_template.jinja", "{% if %}", "the chat template is malformed (TemplateSyntaxError"),
])
def test_a_directory_that_would_be_read_wrongly_is_refused(checkpoint, tmp_path, file, change, words):
    path = changed(checkpoint, tmp_path / "broken", {file: change})
    assert words in refusal(model.load_tokenizer, path)


@pytest.mark.parametrize("normalizer", [None, NFC, {"type": "Sequence", "normalizers": [NFC]}])
def test_text_is_normalised_as_the_file_says(checkpoint, tmp_path, normalizer):
    path = changed(checkpoint, tmp_path / "other", {"tokenizer.json": {"normalizer": normalizer}})
    reference = tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json")
    assert model.load_tokenizer(path).encode("cafe\u0301 12") == reference.encode("cafe\u0301 12").ids


def test_a_directory_without_tokenizer_json_is_mended_as_the_refusal_says(checkpoint, tmp_path):
    bpe = json.loads((ROOT / "toy" / "base" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    path = changed(ROOT / "toy" / "base", tmp_path / "old", {
        "tokenizer.json": None, "vocab.json": json.dumps(bpe["vocab"]), "merges.txt": "\n".join(bpe["merges"]),
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_start|>"]}})
    call = f"AutoTokenizer.from_pretrained({path!r}).save_pretrained({path!r})"
    assert refusal(model.load_tokenizer, path).endswith(call)
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(path)
    text = "Tom has 12 apples.\n\n  cafe\u0301"
    assert model.load_tokenizer(path).encode(text) == model.load_tokenizer(str(ROOT / "toy" / "base")).encode(text)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_that_tiktoken_would_apply_otherwise_are_refused(checkpoint, tmp_path, ignore_merges):
    """Out of order, or too few. Llama 3 lists every way to make a token, which changes no id."""
    file = tmp_path / "other" / "tokenizer.json"
    path = changed(checkpoint, file.parent, {})
    data = json.loads(file.read_text(encoding="utf-8"))
    merges, vocab = data["model"]["merges"], data["model"]["vocab"]
    every_split = [(vocab[token], token[:k], token[k:]) for token in vocab for k in range(1, len(token))
                   if token[:k] in vocab and token[k:] in vocab]

    def write(merges):
        bpe = data["model"] | {"merges": merges, "ignore_merges": ignore_merges}
        file.write_text(json.dumps(data | {"model": bpe}), encoding="utf-8")

    swapped = [merges[1], merges[0], *merges[2:]]
    for wrong in (merges[::-1], swapped, merges[:-1], []):
        write(wrong)
        assert "merges do not make every token in the order of the ids" in refusal(model.load_tokenizer, path)
    for right in (merges, [merge.split(" ") for merge in merges], [[a, b] for _, a, b in sorted(every_split)]):
        write(right)
        ours, reference = model.load_tokenizer(path), tokenizers.Tokenizer.from_file(str(file))
        for problem in (ROOT / "toy" / "test.jsonl").read_text().splitlines()[:100]:
            assert ours.encode(problem) == reference.encode(problem).ids


def test_added_tokens_may_stand_in_the_vocabulary(tmp_path):
    """One that no merge makes is found as an added token alone; one that merges make, in plain text as well."""
    toy = ROOT / "toy" / "base"
    data = json.loads((toy / "tokenizer.json").read_text(encoding="utf-8"))
    bpe, added = data["model"], data["added_tokens"]
    bpe["vocab"] |= {token["content"]: token["id"] for token in added}
    added.append(added[0] | {"content": "ste", "id": bpe["vocab"]["ste"]})
    path = changed(toy, tmp_path / "other", {"tokenizer.json": {"model": bpe, "added_tokens": added}})
    ours, reference = model.load_tokenizer(path), tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json")
    text = "step<|im_end|> system"
    assert ours.encode(text, special=True) == reference.encode(text).ids
    assert ours.encode(text) == model.load_tokenizer(str(toy)).encode(text)


def test_digits_are_cut_out_first_and_bytes_that_the_vocabulary_lacks_are_dropped(tmp_path):
    """As in SmolLM2, whose vocabulary lacks 21 bytes."""
    path = changed(ROOT / "toy" / "base", tmp_path / "digits", {"config.json": {"vocab_size": 999}})
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = tokenizers.pre_tokenizers
    digits, words = steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)
    reference.pre_tokenizer = steps.Sequence([digits, words])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["<|im_end|>"], show_progress=False)
    reference.train_from_iterator(["it's 12 o'clock,  we'll  have 3½ left!\n\n And  1,000 more é中😀"] * 9, trainer)
    reference.save(f"{path}/tokenizer.json")
    ours = model.load_tokenizer(path)
    texts = ["it's  12,  34 5\n\n 6\t7", "12345", " ½ ² ٣ Ⅳ", "we'll  have\n 1",
             "a \x04 b", "é中😀 é", "  1", " \n1 \n", "I'LL"]
    for text in texts:
        assert ours.encode(text) == reference.encode(text).ids, text
    assert ours.decode(ours.encode("we'll have 3½")) == "we'll have 3½" and ours.encode("\x04") == []


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(checkpoint, tokenizer, tmp_path):
    last = max(tokenizer.pieces)
    short = changed(checkpoint, tmp_path / "short", {"config.json": {"vocab_size": last}})
    assert f"ids up to {last}, but config.json says vocab_size = {last};" in refusal(model.load_tokenizer, short)
    exact = changed(checkpoint, tmp_path / "exact", {"config.json": {"vocab_size": last + 1}})
    assert model.load_tokenizer(exact).pieces == tokenizer.pieces


# --------------------------------------------------------------------------------------------------------------- chats


def test_chat_template_renders_as_in_transformers(checkpoint, tokenizer):
    reference = transformers.AutoTokenizer.from_pretrained(checkpoint)
    messages = turns(" 1+1? ", system="Be brief.")
    for generation_prompt in (True, False):
        text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        assert tokenizer.chat(messages, generation_prompt) == text
        assert tokenizer.encode_chat(messages, generation_prompt) == tokenizer.encode(text, special=True)


@pytest.mark.parametrize("template, expected", [
    ("{% if tools is not none %}tools{% endif %}{% for m in messages %}{{ m.content | tojson }}"
     "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}{{ documents | tojson(indent=1) }}", '"é""b""c"null'),
    # marks for other trainers: their body is rendered, in a scope of its own
    ("{% set x = 1 %}{% for m in messages %}\n  {%- generation -%}\n {{ m.content }}{% set x = 2 %}\n"
     "  {% endgeneration %}\n|{% endfor %}{{ x }}", "é|b|c|1"),
])
def test_templates_see_what_transformers_gives_them(checkpoint, tmp_path, template, expected):
    ours = with_template(checkpoint, tmp_path / "other", template)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "other")
    messages = turns("é", "b", "c")
    assert ours.chat(messages) == expected == reference.apply_chat_template(messages, tokenize=False)


def test_a_model_that_may_think_is_asked_not_to_unless_the_caller_wants_it(checkpoint, tmp_path):
    """As Qwen3's template is: thinking is off if, and only if, enable_thinking is given and false."""
    template = ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
                "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}")
    ours = with_template(checkpoint, tmp_path / "thinks", template)
    assert ours.chat(turns("Q")) == "Q<think></think>"
    assert ours.chat(turns("Q"), enable_thinking=True) == "Q"


def test_of_several_chat_templates_the_default_is_taken(checkpoint, tokenizer, tmp_path):
    with open(f"{checkpoint}/tokenizer_config.json", encoding="utf-8") as f:
        template = json.load(f)["chat_template"]
    named = [{"name": name, "template": template if name == "default" else "x"} for name in ("rag", "default", "tools")]
    path = changed(checkpoint, tmp_path / "named", {"tokenizer_config.json": {"chat_template": named}})
    assert model.load_tokenizer(path).encode_chat(turns("1+1?")) == tokenizer.encode_chat(turns("1+1?"))


def test_a_model_without_a_template_gets_the_plain_prompt(checkpoint, tmp_path):
    path = changed(checkpoint, tmp_path / "plain", {"tokenizer_config.json": {"chat_template": None}})
    plain = model.load_tokenizer(path)
    assert sample.encode_prompt(plain, "1+1?", "Be brief.") == plain.encode("1+1?")
    assert refusal(plain.chat, turns("1+1?")) == "this checkpoint has no chat template"


def test_special_tokens_that_a_user_typed_stay_text(tokenizer):
    stop = tokenizer.added["<|im_end|>"]
    honest, typed = tokenizer.encode_chat(turns("hello")), tokenizer.encode_chat(turns("hello<|im_end|>"))
    assert honest.count(stop) == typed.count(stop) == 1
    assert tokenizer.decode(typed).count("<|im_end|>") == 2  # the text itself is all there
    assert stop not in tokenizer.encode("<|im_end|>")


@pytest.mark.parametrize("contents, text", [
    (["<a>", "<<a>>"], "<<a>>"), (["<a>", "<a>>"], "<a>>"), (["ab|", "|cd"], "ab|cd")])
def test_special_tokens_within_one_another_stay_text_too(checkpoint, tokenizer, tmp_path, contents, text):
    ids = [max(tokenizer.pieces) + 1, max(tokenizer.pieces) + 2]
    with open(f"{checkpoint}/tokenizer.json", encoding="utf-8") as f:
        added = json.load(f)["added_tokens"]
    added += [added[0] | {"id": i, "content": content} for i, content in zip(ids, contents)]
    path = changed(checkpoint, tmp_path / "other", {
        "tokenizer.json": {"added_tokens": added}, "config.json": {"vocab_size": 999}})
    tokenizer = model.load_tokenizer(path)
    typed = tokenizer.encode_chat(turns(text))
    assert not {*ids} & {*typed} and text in tokenizer.decode(typed)
    reference = tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json")
    assert tokenizer.encode(text, special=True) == reference.encode(text).ids


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch hostile') }}",
    "{{ raise_exception.__globals__['os'].system('touch hostile') }}",
    "{{ messages.append(1) }}",
    "{{ ('%s' | attr('__class__')).mro() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**15 }}",
    "{{ 1 / 0 }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages[0]['content'] + 1 }}",
])
def test_a_chat_template_reaches_nothing(checkpoint, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    tokenizer = with_template(checkpoint, tmp_path / "model", template + "{{ messages[0].content }}")
    assert "the chat template is malformed" in refusal(tokenizer.chat, turns("?"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# -------------------------------------------------------------------------- templates that leave out or change text

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
R1 = CHATML.replace("CONTENT", "m.content.split('</think>')[-1]")  # cuts the reasoning off
R1_OPENED = R1.replace("assistant\n", "assistant\n<think>\n")  # and begins it in the prompt
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
LAST_ONLY = CHATML.replace("in messages %}", "in messages[-1:] %}")
TRIMMED = CHATML.replace("CONTENT", "m.content | trim")
RESPACED = CHATML.replace("CONTENT", "m.content.split('</think>') | map('trim') | join('\\n</think>\\n\\n')")
THOUGHT = "<think>\nThree and four make seven.\n</think>\n\n#### 7"


@pytest.mark.parametrize("template, messages, words", [
    (R1, turns("3+4?", THOUGHT), "message 2 (assistant) or a part of it, as reasoning"),
    (R1_OPENED, turns("3+4?", THOUGHT), "message 2 (assistant) or a part of it"),
    (R1, turns("3+4?", THOUGHT, "2+2?", "#### 4"), "message 2 (assistant)"),
    (NO_SYSTEM, turns("3+4?", "#### 7", system="Think step by step."), "message 1 (system)"),
    (NO_SYSTEM, turns("3+4?", "#### 7", system="4"), "message 1 (system) or a part of it"),
    (LAST_ONLY, turns("3+4?", "#### 7"), "message 1 (user)"),
    (LAST_ONLY, turns("Yes", "Yes"), "leaves out message"),
    (R1_OPENED, turns("3+4?", "#### 7"), "ends a prompt with what it leaves out of a written turn"),
    (CHATML.replace("CONTENT", "m.content ~ (loop.last and '!' or '')"), turns("?", "7"), "changes earlier messages"),
    (CHATML.replace("CONTENT", "m.content ~ (loop.last and m.role == 'assistant' and '!' or '')"),
     turns("?", "7", "?", "8"), "changes earlier messages"),
    (CHATML.replace("<|im_end|>", "").replace("CONTENT", "m.content"), turns("?", "7"), "without a special token"),
    ("{{ raise_exception('no chats') }}", turns("?", "7"), "refuses these messages: no chats"),
])
def test_a_chat_that_would_be_trained_otherwise_is_refused_with_the_cause(
        checkpoint, tmp_path, template, messages, words):
    tokenizer = with_template(checkpoint, tmp_path / "other", template.replace("CONTENT", "m.content"))
    assert words in refusal(tokenizer.encode_turns, messages)


def test_a_prompt_whose_system_message_would_be_lost_is_refused(checkpoint, tmp_path):
    tokenizer = with_template(checkpoint, tmp_path / "other", NO_SYSTEM.replace("CONTENT", "m.content"))
    assert "message 1 (system)" in refusal(sample.encode_prompt, tokenizer, "3+4?", "Think step by step.")
    assert sample.encode_prompt(tokenizer, "3+4?") == tokenizer.encode_chat(turns("3+4?"))


@pytest.mark.parametrize("template", [TRIMMED, RESPACED])
@pytest.mark.parametrize("content", ["  spaces \n", "", " \n", "<think>A</think>\n7", "<|im_end|> typed"])
def test_templates_may_trim_what_messages_say(checkpoint, tmp_path, template, content):
    tokenizer = with_template(checkpoint, tmp_path / "other", template)
    ids, trained = tokenizer.encode_turns(turns("?", content, content, content, system=content))
    said = tokenizer.decode([i for i, is_trained in zip(ids, trained) if is_trained])
    assert "".join(said.split()) == 2 * "".join((content + "<|im_end|>").split())


# -------------------------------------------------------------------------------------------- stop tokens and padding


TEXT, START, END = 437, 438, 439  # the toy's <|endoftext|>, <|im_start|>, <|im_end|>
PLAIN = {"chat_template": None, "eos_token": None}
REFUSES = "{{ raise_exception('no chats') }}"


@pytest.mark.parametrize("generation, config, tokenizer_config, stop_ids, eos_id", [
    (END, END, {}, {END}, END),
    # the files name another end than the chat template, or than the tokenizer
    (TEXT, TEXT, {}, {TEXT, END}, END),
    (TEXT, TEXT, {"eos_token": "<|endoftext|>"}, {TEXT, END}, END),
    (TEXT, TEXT, {"chat_template": None}, {TEXT, END}, END),
    (TEXT, TEXT, PLAIN, {TEXT}, TEXT),
    # generation_config.json goes before config.json
    ([TEXT, START], END, PLAIN, {TEXT, START}, TEXT),
    (None, [START], {"eos_token": "<|endoftext|>"}, {TEXT, START, END}, END),
    (None, None, {}, {END}, END),
    # templates: with an end of the text behind that of the turn, without any end, and one that refuses the conversation
    (TEXT, TEXT, {"chat_template": TRIMMED + "<|endoftext|>", "eos_token": None}, {TEXT, END}, END),
    (TEXT, TEXT, {"chat_template": TRIMMED.replace("<|im_end|>", ""), "eos_token": None}, {TEXT}, TEXT),
    (TEXT, TEXT, {"chat_template": REFUSES, "eos_token": {"content": "<|im_end|>"}}, {TEXT, END}, END),
])
def test_every_end_that_the_checkpoint_knows_is_a_stop(
        generation, config, tokenizer_config, stop_ids, eos_id, tmp_path):
    tokenizer = model.load_tokenizer(changed(ROOT / "toy" / "base", tmp_path / "toy", {
        "generation_config.json": {"eos_token_id": generation}, "config.json": {"eos_token_id": config},
        "tokenizer_config.json": tokenizer_config}))
    assert (tokenizer.stop_ids, tokenizer.eos_id) == (stop_ids, eos_id)


def test_a_checkpoint_that_names_no_stop_is_refused(tmp_path):
    nothing = {"eos_token_id": None}
    path = changed(ROOT / "toy" / "base", tmp_path / "toy", {
        "generation_config.json": nothing, "config.json": nothing, "tokenizer_config.json": PLAIN})
    assert "eos_token_id (config.json or generation_config.json) must be" in refusal(model.load_tokenizer, path)


def test_the_base_models_of_qwen_stop_where_their_chat_template_ends_a_turn(tmp_path):
    real_tokenizer("qwen2.5", tmp_path, ".base")
    # Qwen2.5-1.5B's; config.json is the published one, which names <|endoftext|> alone
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 151643, "eos_token_id": 151643}')
    shutil.copy(SHARED / "tokenizers" / "qwen2.5" / "config.1.5B.json", tmp_path / "config.json")
    tokenizer = model.load_tokenizer(str(tmp_path))
    assert tokenizer.stop_ids == {151643, 151645} and tokenizer.decode([tokenizer.eos_id]) == "<|im_end|>"
    ids, _ = tokenizer.encode_turns(turns("1+1?", "2"))
    assert ids[-1] == tokenizer.eos_id and tokenizer.pad_id not in tokenizer.stop_ids


def test_the_toy_answers_alike_when_its_files_name_another_stop_token(tmp_path):
    stale = {"eos_token_id": TEXT}
    path = changed(ROOT / "toy" / "base", tmp_path / "toy", {"generation_config.json": stale, "config.json": stale})
    problems = [json.loads(line) for line in (ROOT / "toy" / "test.jsonl").read_text().splitlines()[:8]]
    texts = []
    for directory in (path, str(ROOT / "toy" / "base")):
        net, tokenizer = model.load_model(directory, device="cpu"), model.load_tokenizer(directory)
        prompts = [tokenizer.encode_chat(turns(problem["question"])) for problem in problems]
        answers = [answer for [answer] in sample.generate(net, tokenizer, prompts, max_new_tokens=64, temperature=0)]
        assert not any(answer.truncated for answer in answers)
        texts.append([answer.text for answer in answers])
    assert texts[0] == texts[1]


def test_pad_is_never_a_stop_id(tokenizer, checkpoint, tmp_path):
    assert tokenizer.pad_id == tokenizer.added["<|endoftext|>"]
    path = changed(checkpoint, tmp_path / "other", {"tokenizer_config.json": {"pad_token": "<|im_end|>"}})
    other = model.load_tokenizer(path)
    assert other.pad_id in other.pieces and other.pad_id not in other.stop_ids
