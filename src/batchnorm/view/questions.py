"""What learners ask in public threads, the most frequent first, with answers in PyTorch's terms."""

from __future__ import annotations

ASKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Which mean does eval use, and why does eval differ from train?",
        (
            "In train mode each batch is normalized by its own mean and variance. In eval mode by the running mean and "
            "variance: averages of what the batches of training measured. So one value goes out differently in the two "
            "modes, whenever a batch is unlike that average. The weights, γ and β are the same.",
        ),
    ),
    (
        "Do γ and β undo the normalization?",
        (
            "They could undo it for one batch: with γ = √(var + ε) and β = mean. But mean and variance change with "
            "every batch, and γ and β are shared by all. They set the mean and the spread that every batch goes out "
            "with.",
            "In eval mean and variance stand still: there the whole layer is one line, y = a·x + b, with "
            "a = γ/√(running var + ε) and b = β − a · running mean.",
        ),
    ),
    (
        "How are γ and β learned, if every batch has another mean and variance?",
        (
            "As any weight is. They are parameters: the backward pass gives ∂L/∂γ = Σ dy · x̂ and ∂L/∂β = Σ dy over "
            "the batch, and the optimizer moves both a little. The next batch starts from there. Mean and variance are "
            "measured, and forgotten; nothing learns them.",
        ),
    ),
    (
        "Should the layer before have a bias?",
        (
            "No: what it adds to all values of a channel is in their mean too, and x − mean takes it out again. Its "
            "gradient is 0 in train mode. Give that layer bias=False; β does its work.",
        ),
    ),
    (
        "How do I freeze batch norm?",
        (
            "Two things can be frozen, each on its own. The running statistics: layer.eval(), which the next "
            "model.train() ends; bn.freeze(model) lasts. γ and β: requires_grad=False, or "
            "bn.freeze(model, stats=False, affine=True).",
            "model.eval() does not stop γ and β from learning, and requires_grad=False does not stop the running "
            "statistics from moving in train mode.",
        ),
    ),
    (
        "Over which axes are mean and variance taken?",
        (
            "Over all but the channels, which are dimension 1: for (N, C) over N, for (N, C, L) over N and L, for "
            "(N, C, H, W) over N, H and W. So an image of 32 × 32 counts as 1,024 values of each channel.",
        ),
    ),
    (
        "Before or after the ReLU?",
        (
            "Both are used. The paper has it before, between the layer and its activation: β then sets how much of "
            "each channel the ReLU lets through. After it, the next layer gets inputs of mean β and deviation |γ|. "
            "Which is better is a question for an experiment; a ResNet has it before.",
        ),
    ),
    (
        "What if a batch has one sample?",
        (
            "With one value per channel x − mean is 0, so the output would always be β; PyTorch raises an error in "
            "train mode. One image has H·W values per channel and can be normalized, by itself alone. In eval mode "
            "nothing is measured, and one sample works as well as many.",
        ),
    ),
    (
        "Does batch norm regularize?",
        (
            "A little: in train mode the output for a sample depends on the others in its batch, which are random. "
            "That noise shrinks as batches grow, and is gone in eval mode.",
        ),
    ),
    (
        "Why are there four numbers per channel?",
        (
            "Two are learned: γ and β, parameters, with gradients. Two are tracked: running mean and running variance, "
            "buffers, without. All four are in the state_dict, with one counter per layer, num_batches_tracked. The "
            "batch's own mean and variance are not kept.",
        ),
    ),
    (
        "What does momentum mean?",
        (
            "running = (1 − momentum) · running + momentum · batch. In PyTorch it is the weight of the new batch; in "
            "Keras and TensorFlow that of the old average. It is unrelated to the optimizer's momentum, and "
            "to γ and β.",
        ),
    ),
    (
        "Does the gradient flow through the mean and the variance?",
        (
            "In train mode it does, since both are computed from x: dx = γ/√(var + ε) · (dy − mean(dy) − x̂ · mean(dy "
            "· x̂)). The two means take out what a shift of the whole batch, and a stretch of it, would do, since "
            "neither changes the output. In eval mode both are constants, and dx = γ/√(running var + ε) · dy.",
        ),
    ),
)
