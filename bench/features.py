"""Features like those of a re-identification data set, of any size."""

import numpy as np


def reid_features(n, d=1280, n_ids=None, n_cams=6, seed=0, dtype=np.float32):
    "(n, d) unit rows sorted by identity, as files are; identity, camera, identity-in-camera, heavy-tailed image noise"
    rng = np.random.default_rng(seed)
    n_ids, latent = n_ids or max(4, n // 17), 96
    pids, camids = np.sort(rng.integers(0, n_ids, n)), rng.integers(0, n_cams, n)
    lift = rng.normal(size=(latent, d)).astype(np.float32) / np.float32(d**0.5)
    ids, cams = rng.normal(size=(n_ids, latent)), 0.5 * rng.normal(size=(n_cams, latent))
    seen = 0.4 * rng.normal(size=(n_ids * n_cams, latent))
    x = np.empty((n, d), dtype)
    for start in range(0, n, 8192):
        p, c = pids[start : start + 8192], camids[start : start + 8192]
        blur = 0.3 + 0.5 * np.minimum(abs(rng.standard_t(4, size=(len(p), 1))), 3)
        z = (ids[p] + cams[c] + seen[p * n_cams + c] + blur * rng.normal(size=(len(p), latent))).astype(np.float32)
        y = z @ lift + rng.normal(size=(len(p), d)).astype(np.float32) * np.float32(0.8 / d**0.5)
        x[start : start + 8192] = y / np.linalg.norm(y, axis=1, keepdims=True)
    return x, pids, camids
