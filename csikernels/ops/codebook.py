"""Codebook search: the op's schemas, fakes and public names."""

from __future__ import annotations

import torch

from csikernels import _dispatch
from csikernels._arrays import accepts_arrays
from csikernels.reference import codebook as reference

PACK = _dispatch.define(
    "codebook_pack(Tensor codebook, str precision, bool copy=True) -> (Tensor words, Tensor packed)"
)
SEARCH = _dispatch.define(
    "codebook_search(Tensor h, Tensor words, Tensor packed, Tensor? environment, str precision)"
    " -> (Tensor index, Tensor similarity)"
)
PRECISIONS = ("exact", "float32")
_COMPLEX = (torch.complex64, torch.complex128)

_dispatch.implement(PACK, "reference")(reference.pack)
_dispatch.implement(SEARCH, "reference")(reference.search)


@_dispatch.register_fake(PACK)
def _(codebook, precision, copy=True):
    # Each backend has its own packed layout, so its size is known only once the codebook is packed.
    size = torch.library.get_ctx().new_dynamic_size()
    words = torch.empty(codebook.shape if copy else 0, dtype=codebook.dtype, device=codebook.device)
    return words, torch.empty(size, dtype=torch.uint8, device=codebook.device)


@_dispatch.register_fake(SEARCH)
def _(h, words, packed, environment, precision):
    return h.new_empty(h.shape[0], dtype=torch.int64), h.new_empty(h.shape[0], dtype=torch.float32)


class Codebook:
    """A codebook packed once for many searches.

    The codewords are copied, so changing ``codebook`` afterwards does not change the searches; use :meth:`update`. With
    ``copy=False`` the tensor itself is kept, which saves its size (1.07 GB for 2^20 words of 128 complex64): the caller
    must not change it afterwards, or searches return indices of neither the old words nor the new ones.

    Args:
        codebook: complex64 or complex128 [K, D], or [E, K, D] for one codebook per environment; tensor or array. The
            codewords need not have unit norm.
        precision: ``"exact"`` returns the index that float64 arithmetic returns; ``"float32"`` computes in float32, so
            among words closer than float32 rounding any may be returned. On a GPU both find what may be the best with
            tensor cores, which takes nearly all of the time.
        copy: whether to copy the codewords. False takes contiguous complex64 alone, which every backend can search as
            it is; it never copies after all.

    Raises:
        TypeError: ``codebook`` is not a complex tensor or array.
        ValueError: wrong number of dimensions, an empty dimension, an unknown precision, a codeword that is zero or
            holds NaN or infinity, or one that cannot be kept without a copy.
    """

    def __init__(self, codebook, precision: str = "exact", *, copy: bool = True):
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
        self.precision = precision
        self.update(codebook, copy=copy)

    @accepts_arrays
    def update(self, new, *, copy: bool = True) -> None:
        """Replace the codewords by ``new`` (same rules as the constructor's ``codebook`` and ``copy``) and pack them.

        Whatever is raised, the old codewords stay usable.
        """
        _check_codebook(new)
        if not copy:
            _check_kept(new)
        words, packed = torch.ops.csikernels.codebook_pack(new.detach(), self.precision, copy)
        self._words, self._packs = words if copy else new.detach(), {_dispatch.chosen_backend(): packed}

    def search(self, h, environment=None):
        """Best codeword of each row of ``h``; see :func:`codebook_argmax` for the rules.

        Args:
            h: complex64 or complex128 [N, D] on the codebook's device.
            environment: int64 [N], the codebook of each row; required with [E, K, D], refused with [K, D].

        Returns:
            index int64 [N], similarity float32 [N].
        """
        if type(h) is torch.Tensor and (environment is None or type(environment) is torch.Tensor):
            return self._search(h, environment)  # a single query takes microseconds, and so does looking for arrays
        return self._search_arrays(h, environment)

    def _search(self, h, environment):
        _check_queries(h, self._words, environment)
        rows = h.detach() if h.requires_grad else h
        return torch.ops.csikernels.codebook_search.default(
            rows, self._words, self._packed(), environment, self.precision
        )

    _search_arrays = accepts_arrays(_search)

    def _packed(self) -> torch.Tensor:
        # A pack has the layout of the backend that made it; forcing another backend packs anew, once.
        backend = _dispatch.chosen_backend()
        if backend not in self._packs:
            copy = self._words.dtype != torch.complex64  # of no use here, but complex128 is not packed without
            self._packs[backend] = torch.ops.csikernels.codebook_pack(self._words, self.precision, copy)[1]
        return self._packs[backend]

    def __getstate__(self) -> dict:
        # Copies and pickles pack anew: another machine may have another backend.
        return {**self.__dict__, "_packs": {}}

    @property
    def shape(self) -> torch.Size:
        """[K, D] or [E, K, D]."""
        return self._words.shape

    @property
    def dtype(self) -> torch.dtype:
        """complex64 or complex128."""
        return self._words.dtype

    @property
    def device(self) -> torch.device:
        """Where the packed codewords live and ``h`` is expected."""
        return self._words.device

    @property
    def nbytes(self) -> int:
        """Bytes held: the codewords and what was packed from them."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._words, *self._packs.values()))

    def __repr__(self) -> str:
        what = f"shape={tuple(self.shape)}, dtype={self.dtype}, precision={self.precision!r}, device={self.device}"
        return f"Codebook({what})"


@accepts_arrays
def codebook_argmax(h, codebook, environment=None):
    """Index of the codeword with the largest cosine similarity |c^H h| / (|c| |h|), and that similarity.

    This is the selection rule of codebook-based CSI feedback (LVM4CF, Zhuang et al., eqs. 6 and 11): the UE reports the
    index. ``environment`` selects among codebooks of several environments (MSLCF, section III-B). To search one
    codebook often, pack it once with :class:`Codebook`.

    - The index is the one that float64 arithmetic returns. Words whose similarities agree to within float64 rounding
      are tied, and the lowest index among them is returned.
    - Scale does not matter: codewords and rows of any norm, down to denormals, give the same answer.
    - A row of ``h`` that is zero or holds NaN or infinity gives index -1 and similarity NaN.
    - Memory is bounded: the N x K similarities are never held at once.
    - Not differentiable: gradients do not flow to ``h`` or ``codebook``.
    - On a GPU of compute capability 8.0 or later the default is ``"cuda"`` where the extension was built with it, else
      ``"triton"``. On sm_90 Triton's kernel uses the products of warp groups (HGMMA), which have twice the rate of the
      CUDA kernel's (HMMA) and should win where N is large; the CUDA kernel has a launch less, for few queries. Neither
      has run on a GPU yet, so the default is the same on all. Both are for D of at most 256, Triton for K of at most
      2^22 besides; larger sizes take the reference.
    - A search does not wait for the GPU and can be captured in a CUDA graph (with Triton, after a first call outside,
      which tunes the kernel), so an environment out of range stops the GPU, as an index out of range does in torch.
      Packing waits, to name a codeword that it refuses.

    Args:
        h: complex64 or complex128 [N, D]; tensor or array.
        codebook: complex64 or complex128 [K, D], or [E, K, D] together with ``environment``.
        environment: int64 [N], values in 0..E-1.

    Returns:
        index int64 [N], similarity float32 [N] (between 0 and 1).

    Raises:
        TypeError: ``h`` or ``codebook`` is not complex, or ``environment`` is not int64.
        ValueError: shapes or devices do not fit, an environment is out of range, or a codeword is zero or holds NaN or
            infinity.
    """
    return Codebook(codebook).search(h, environment)


def _check_complex(name: str, value) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a complex tensor or array, got {type(value).__name__}")
    if value.dtype not in _COMPLEX:
        raise TypeError(f"{name}: expected complex64 or complex128, got {value.dtype}")


def _check_codebook(codebook) -> None:
    _check_complex("codebook", codebook)
    if codebook.dim() not in (2, 3) or 0 in codebook.shape:
        raise ValueError(f"codebook: expected a non-empty [K, D] or [E, K, D], got shape {tuple(codebook.shape)}")


def _check_kept(codebook: torch.Tensor) -> None:
    # A traced graph cannot ask; there the backends resolve it, which costs the copy that was to be saved.
    pending = not torch.compiler.is_compiling() and (codebook.is_conj() or codebook.is_neg())
    if codebook.dtype != torch.complex64 or not codebook.is_contiguous() or pending:
        layout = "pending conjugation" if pending else f"strides {codebook.stride()}"
        raise ValueError(f"codebook: expected contiguous complex64 for copy=False, got {codebook.dtype}, {layout}")


def _check_queries(h, words: torch.Tensor, environment) -> None:
    _check_complex("h", h)
    if h.dim() != 2 or h.shape[1] != words.shape[-1]:
        raise ValueError(f"h: expected [N, {words.shape[-1]}], got shape {tuple(h.shape)}")
    if h.device != words.device:
        raise ValueError(f"h: expected a tensor on {words.device}, where the codebook is, got one on {h.device}")
    if (environment is None) != (words.dim() == 2):
        shape = tuple(words.shape)
        wanted = "none for a codebook [K, D]" if words.dim() == 2 else "int64 [N] for a codebook [E, K, D]"
        raise ValueError(f"environment: expected {wanted}, here {shape}, got {_describe(environment)}")
    if environment is None:
        return
    if not isinstance(environment, torch.Tensor) or environment.dtype != torch.int64:
        raise TypeError(f"environment: expected an int64 tensor or array, got {_describe(environment)}")
    if environment.shape != h.shape[:1]:
        raise ValueError(f"environment: expected shape ({h.shape[0]},), got {tuple(environment.shape)}")
    if environment.device != h.device:
        raise ValueError(f"environment: expected a tensor on {h.device}, got one on {environment.device}")


def _describe(value) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
