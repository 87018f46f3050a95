"""spqr-jax: does a safety-aligned text-to-image model stay safe when someone fine-tunes it on harmless images?

The rooms of the package. docs/architecture.md says how they work together and which room may import which.

    config       the typed configuration of a run
    params       weights: nested dictionaries of arrays under diffusers' names
    pipeline     a text-to-image model as a value: weights, configs, tokenizers, and its attachments
    prompts      prompt files, read unchanged
    concepts     what a method erases, as a value, with presets
    profiles     which weights each fine-tuning profile trains
    generate     prompts to images, over all devices
    finetune     benign fine-tuning of a pipeline on captioned images

    devices/     the mesh of devices, several processes as one program, stopping on SIGTERM
    files/       the layout of a work directory: records, images, checkpoints, local or in a bucket
    schedulers/  samplers as tables and pure step functions, and the noising process for training
    backbones/   everything that only one architecture knows, one file for each architecture, and the models
    sampling/    the compiled sampling loop, guidance, noise, batch sizes, attachments
    training/    the compiled training step, the objective, adapters, encoded data sets, logs
    data/        captioned images from the layouts of public data sets
    methods/     safety alignment methods, one file each
    mini/        the emoji world: a small model with its data, prompts and judges
    recipe/      how the files of the emoji world were made
    score/       S, P, Q, R and SPQR with intervals, from records and features alone
    report/      the report, tables, figures and comparisons of finished runs
    run/         one run from its config to its report, in stages
    fit/         whether a config fits on devices that are not there, and how long it takes

Importing this package imports none of them.
"""

__version__ = "0.1.0"
