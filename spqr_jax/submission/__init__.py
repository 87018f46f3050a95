"""Submissions: a finished run as a bundle that anyone can check without its images, weights or prompts.

This room may know everything below it, and nothing of `fit`. Reading and verifying a bundle does no work on a device;
only `rerun` makes images. A bundle is not trusted: it is read by `bundle.read` alone, which checks before it believes.

A bundle is a directory with the files of a work directory that scores are computed from:

    submission.json              the index: version of the format, id of the submission, size and sha256 of each file
    manifest.json                the run's: config, versions, devices, hashes of weights, data and prompts, judges
    prompts.json                 the prompts of both roles: id, sha256 of the text, category, language, seed, guidance
    leaderboard.json             the scores, and in `evidence` the digest of all that they were computed from
    reference_features.npz       mu float64 [D] and sigma float64 [D, D] of the real images, and their `identity`
    cells/<id>/cell.json         as in the run
    cells/<id>/records.parquet   as in the run, with the sha256 of each prompt in place of its text
    cells/<id>/features.npz      as in the run: float32 [N, D] of the benign images before and after
    cells/<id>/drift.parquet     as in the run, where harm was measured during fine-tuning

JSON is UTF-8 in one canonical form (`documents.dumps`), and the shape of every document is a JSON Schema in the folder
`schemas`. The text of a prompt is in prompts.json only where its licence allows that. No image is in a bundle.

The id of a submission is a digest of all bytes of its files: of names, sizes and hashes, as the index has them. Who
changes a byte has another id.
"""
