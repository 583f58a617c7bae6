# The compiled module, as csrc/bindings.cpp defines it. Pointers are addresses (int), 0 is null.
#
# A build has the functions that its compiler and platform allow; csrc/kernels.h says which, and
# describes shapes and meaning of the arguments.

from typing import Protocol

cpu_features: list[str]
has_cuda: bool
cuda_archs: list[str]
avx512: Layers
avx2: Layers

class ConvSizes:
    E: int
    P: int
    Q: int
    N: int
    O: int
    source_E: int
    H: int
    W: int
    C: int
    R: int
    S: int
    stride: int
    padding: int
    side_H: int
    side_W: int
    D: int
    side_stride: int
    input_grad: bool
    groups: int
    channels: int
    outputs: int
    def __init__(
        self,
        *,
        E: int = 1,
        P: int,
        Q: int,
        N: int,
        O: int,
        source_E: int = 1,
        H: int,
        W: int,
        C: int,
        R: int,
        S: int,
        stride: int,
        padding: int,
        side_H: int = 0,
        side_W: int = 0,
        D: int = 0,
        side_stride: int = 1,
        input_grad: bool = False,
        groups: int = 1,
        channels: int = 0,
        outputs: int = 0,
    ) -> None: ...

class PoolSizes:
    N: int
    H: int
    W: int
    C: int
    P: int
    Q: int
    kernel: int
    stride: int
    padding: int
    def __init__(
        self,
        *,
        N: int,
        H: int,
        W: int,
        C: int,
        P: int,
        Q: int,
        kernel: int,
        stride: int,
        padding: int,
    ) -> None: ...

def softmax_combine(
    gate_logits: int,
    expert_logits: int,
    logits: int,
    B: int,
    E: int,
    K: int,
    num_threads: int = 0,
) -> None: ...
def softmax_combine_backward(
    grad_logits: int,
    gate_logits: int,
    expert_logits: int,
    grad_gate_logits: int,
    grad_expert_logits: int,
    B: int,
    E: int,
    K: int,
    num_threads: int = 0,
) -> None: ...
def softmax_combine_cross_entropy(
    gate_logits: int,
    expert_logits: int,
    labels: int,
    loss: int,
    grad_gate_logits: int,
    grad_expert_logits: int,
    B: int,
    E: int,
    K: int,
    num_threads: int = 0,
) -> None: ...
def linf_step(
    adversarial: int,
    grad: int,
    images: int,
    epsilon: int,
    step_size: int,
    B: int,
    P: int,
    low: float,
    high: float,
    num_threads: int = 0,
) -> None: ...
def content_hashes(
    addresses: int, sizes: int, hashes: int, count: int, num_threads: int = 0
) -> None: ...
def conv_sm90a_tiles(
    sizes: ConvSizes,
    multiprocessors: int,
    clusters: bool,
) -> tuple[int, int, int, int, bool]: ...
def conv_by_schedule(
    source: int,
    weight: int,
    side: int,
    side_weight: int,
    bias: int,
    addend: int,
    activation: int,
    output: int,
    sizes: ConvSizes,
    relu: bool,
    tile_rows: int,
    tile_channels: int,
    num_workers: int,
    by_expert: bool,
) -> int: ...
def softmax_combine_cuda(
    gate_logits: int,
    expert_logits: int,
    logits: int,
    B: int,
    E: int,
    K: int,
    dtype: int,
    stream: int,
) -> None: ...
def softmax_combine_backward_cuda(
    grad_logits: int,
    gate_logits: int,
    expert_logits: int,
    grad_gate_logits: int,
    grad_expert_logits: int,
    B: int,
    E: int,
    K: int,
    dtype: int,
    stream: int,
) -> None: ...
def softmax_combine_cross_entropy_cuda(
    gate_logits: int,
    expert_logits: int,
    labels: int,
    loss: int,
    grad_gate_logits: int,
    grad_expert_logits: int,
    B: int,
    E: int,
    K: int,
    dtype: int,
    stream: int,
) -> None: ...
def linf_step_cuda(
    adversarial: int,
    grad: int,
    images: int,
    epsilon: int,
    step_size: int,
    B: int,
    P: int,
    low: float,
    high: float,
    dtype: int,
    stream: int,
) -> None: ...
def conv_sm90a(
    source: int,
    weight: int,
    side: int,
    side_weight: int,
    bias: int,
    addend: int,
    activation: int,
    output: int,
    sizes: ConvSizes,
    relu: bool,
    clusters: bool,
    dtype: int,
    stream: int,
) -> None: ...

class Layers(Protocol):
    """The layers of one network, compiled for one set of instructions: csrc/cpu/layers.h."""

    @staticmethod
    def conv_direct(
        source: int,
        weight: int,
        side: int,
        side_weight: int,
        bias: int,
        addend: int,
        activation: int,
        output: int,
        sizes: ConvSizes,
        relu: bool,
        float32_output: bool,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def conv_winograd(
        source: int,
        weight: int,
        side: int,
        side_weight: int,
        bias: int,
        addend: int,
        activation: int,
        output: int,
        sizes: ConvSizes,
        relu: bool,
        float32_output: bool,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def conv_depthwise(
        source: int,
        weight: int,
        bias: int,
        addend: int,
        activation: int,
        output: int,
        sizes: ConvSizes,
        relu: bool,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def scale_shift(
        source: int,
        scale: int,
        second: int,
        second_scale: int,
        shift: int,
        addend: int,
        activation: int,
        output: int,
        rows: int,
        C: int,
        relu: bool,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def channel_sums(
        factor: int,
        source: int,
        shift: int,
        sums: int,
        products: int,
        rows: int,
        C: int,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def batch_norm(
        source: int,
        weight: int,
        bias: int,
        running_mean: int,
        running_variance: int,
        numbers: int,
        affine: int,
        rows: int,
        C: int,
        channels: int,
        epsilon: float,
        momentum: float,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def batch_norm_backward(
        grad: int,
        source: int,
        numbers: int,
        grad_weight: int,
        grad_bias: int,
        affine: int,
        rows: int,
        C: int,
        channels: int,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def weight_grad(
        source: int,
        grad: int,
        grad_weight: int,
        sizes: ConvSizes,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def weight_grad_winograd(
        source: int,
        grad: int,
        grad_weight: int,
        sizes: ConvSizes,
        outputs: int,
        channels: int,
        output_stride: int,
        channel_stride: int,
        tap_stride: int,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def layer_norm(
        source: int,
        scale: int,
        shift: int,
        output: int,
        rows: int,
        C: int,
        channels: int,
        epsilon: float,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def layer_norm_backward(
        grad: int,
        source: int,
        scale: int,
        addend: int,
        activation: int,
        grad_source: int,
        rows: int,
        C: int,
        channels: int,
        epsilon: float,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def pack_direct(
        weight: int,
        packed: int,
        O: int,
        K: int,
        outputs: int,
        channels: int,
        taps: int,
        output_stride: int,
        channel_stride: int,
        tap_stride: int,
        doubled: bool,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def pack_winograd(
        weight: int,
        forward: int,
        gradient: int,
        O: int,
        C: int,
        outputs: int,
        channels: int,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def pool(
        source: int,
        output: int,
        sizes: PoolSizes,
        maximum: bool,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def pool_backward(
        grad: int,
        source: int,
        output: int,
        skip: int,
        activation: int,
        grad_source: int,
        sizes: PoolSizes,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def pixel_mean(
        source: int,
        mean: int,
        pixels: int,
        N: int,
        C: int,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
    @staticmethod
    def pixel_mean_backward(
        grad: int,
        activation: int,
        grad_source: int,
        pixels: int,
        N: int,
        C: int,
        dtype: int,
        num_threads: int = 0,
    ) -> None: ...
