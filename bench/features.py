"""Features like those of a re-identification data set, of any size."""

import numpy as np

LATENT = 96  # dimensions in which identities and cameras differ


def reid_features(
    n: int,  # images
    d: int = 1280,  # features
    n_ids: int | None = None,  # identities; None = one for 17 images
    n_cams: int = 6,  # cameras
    seed: int = 0,  # same seed, same features
    dtype: type = np.float32,  # of the features
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (n, d) unit rows; (n,) pids, sorted as files are; (n,) camids
    "Each row is a sum of identity, camera, identity in that camera, and heavy-tailed noise of the image"
    rng = np.random.default_rng(seed)
    n_ids = n_ids or max(4, n // 17)
    pids = np.sort(rng.integers(0, n_ids, n))
    camids = rng.integers(0, n_cams, n)
    lift = rng.normal(size=(LATENT, d)).astype(np.float32) / np.float32(d**0.5)
    identities = rng.normal(size=(n_ids, LATENT))
    cameras = 0.5 * rng.normal(size=(n_cams, LATENT))
    views = 0.4 * rng.normal(size=(n_ids * n_cams, LATENT))
    features = np.empty((n, d), dtype)
    for start in range(0, n, 8192):
        block = slice(start, start + 8192)
        p, c = pids[block], camids[block]
        blur = 0.3 + 0.5 * np.minimum(abs(rng.standard_t(4, size=(len(p), 1))), 3)
        mean = identities[p] + cameras[c] + views[p * n_cams + c]
        latent = (mean + blur * rng.normal(size=(len(p), LATENT))).astype(np.float32)
        rows = latent @ lift + rng.normal(size=(len(p), d)).astype(np.float32) * np.float32(0.8 / d**0.5)
        features[block] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return features, pids, camids
