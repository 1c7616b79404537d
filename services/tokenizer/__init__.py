"""The tokenizer: text and conversations to token ids, and ids back to text as they come.

It owns a model's vocabulary and its chat templates and promises the ids that the model was trained with. It keeps no
state between messages, so any replica can serve any call. `loading` reads a model's folder; `encode` makes ids in
threads; `chat` says what a chat template may do and `renderer` runs it in a process of its own, where one that runs
away is ended; `plain` keeps special tokens the template's alone; `decode`, by what `spelling` says tokens stand for, turns ids to text without ever showing half of a
character; `servicer` is the edge.
"""
