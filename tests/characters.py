"""A tokenizer for the tiny models: one token a printable character."""


class Characters:
    bos_token_id, eos_token_id = 1, None

    def encode(self, text, add_special_tokens=True):
        return [2 + ord(c) - 32 for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i - 2 + 32) if i >= 2 else "\x01" for i in ids)
