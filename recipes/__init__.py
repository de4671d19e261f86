"""Whole runs, as commands, and what puts a technique on any project: a function, and a YAML overlay in ``configs``.

``lightning-peft recipes`` lists them all.
"""

if __name__ == "recipes":
    raise ImportError("import lightning_peft.recipes, not recipes: the bare name would make every class twice")

from lightning_peft.recipes.keep_what_it_knows import keep_what_it_knows

__all__ = ["RUNS", "keep_what_it_knows"]

RUNS = {
    "sentiment": "Learn movie-review sentiment with MiniLM and keep what it could do before.",
    "head_init": "Compare heads that start random, scaled, zero or trained first, by what they do to pretrained features.",
    "leaky_balloon": "Weight decay as a leak: what it takes of a skill that gets no data, and of one that does.",
    "keep_fluent": "Tune SmolLM2 on sentences of film critics while its perplexity on general text is held to a budget.",
    "keep_safe": "Tune SmolLM2 on harmless chat while its refusals are held to a budget.",
    "ladder": "Compare all rungs on one task: prompts, search, soft prompts, prefixes, a probe, LoRA, full fine-tuning.",
    "maml_sinusoid": "Meta-learn sine waves from ten points, beside a network trained on all and one that knows a single wave.",
    "maml_omniglot": "Meta-learn unseen characters from one drawing each, beside nearest centroids and plain training.",
    "maml_adapters": "Meta-learn the start of a LoRA over a frozen encoder: unseen intents from one or five examples each.",
    "code_search": "Complete functions with SmolLM2 by search: what a parser and tests are worth, against tokens and seconds.",
    "generative": "Make images in naive ways, see in numbers why they fail, and mend them: autoencoder, VAE, conditional VAE.",
    "continual": "Learn tasks one after the other and keep the earlier ones: all metrics; by replay, distillation or a budget.",
}
"""Recipes that are a command of their own."""
