"""What stands above the tables of docs/results.md."""

INTRODUCTION = """\
# Results

`python docs/make_results.py` wrote this page from the committed rows in `benchmarks/results`. Each
row holds the commit, versions and hardware that made it. Losses stay in. Nothing here was measured
on a GPU.

How to read accuracies and verdicts: [What the numbers mean](numbers.md). How the benchmarks
measure: `benchmarks/README.md`. "native" in older rows is the back end that is called `avx512` now.
"""

DIGITS = """\
500 test images of scikit-learn's digits, epsilon 0.15 in pixels (at 8/255 even undefended networks
keep most of their accuracy on 8x8 images). Every network is a ResNet-6 of 16 channels (ADVMoE: 32).
Suite `paper`; percent, with the standard deviation over seeds where there are three. A 95 %
interval is +-3.7 points at 77 %. Training ran on one core of a busy machine.

Gates that route hard (Robust Experts, ADVMoE, SoE, RT-ER) are attacked through straight-through
gradients in this suite, so their rows are upper bounds. Immunity draws its gate anew at every pass,
so each row is another chance to fail. No mixture is more robust here than the best single networks.

"""

ARCHITECTURES = """\
The best stock PyTorch is channels_last in bfloat16 under autocast, without a tape for weights,
compiled by torch.compile where that was faster. Ours takes bfloat16 or float32 by its own rule.
Every column's images gained at least nine tenths of eager's loss before it was timed.

"""

MIXTURES = """\
`DWF_BENCH_FULL=1 pytest benchmarks/bench_mixtures.py`: the same on mixtures, as they are and
through two of the about twenty views through which a suite attacks them. Experts are untrained
ResNet-10 of 32 channels; those of Robust Experts and ADVMoE are in a ResNet-18.

"""

LAYERS = """\
`pytest benchmarks/bench_layers.py`: an attack step of a ResNet-18 of width 64. The limit is the
time that a layer's products take at the rate of a large bfloat16 product, measured in the same run;
3x3 convolutions of stride 1 run by Winograd's F(2x4, 3x3), which needs a third of them, and
transforms that the limit leaves out. Products that fall on padding count, though direct
convolutions skip them: a share may pass 1.

"""

SUITE_TIME = """\
`python benchmarks/suite_time.py`: all of `dwf.evaluate(..., suite="standard")`, with contracts,
attacks, doubts, traces and bounds, beside the original AutoAttack's attacks alone, in CPU seconds
of one process. The original attacks half of the images before ours and the other half after it.
"No attack" is the share of our time that is none of
the suite's attacks; "headline stands after" the share after which no attack broke another image.
Networks are trained briefly, for the time.

"""

SCALING = """\
`DWF_BENCH_FULL=1 pytest benchmarks/bench_scaling.py`: PGD on mixtures of untrained ResNet-10 of
width 32, with all experts of one kind and a gate. Stock is the fastest of three: bfloat16 compiled,
bfloat16 not compiled, float32. Every column's images gained at least nine tenths of eager's loss.

"""

TRAINING = """\
`pytest benchmarks/bench_training.py`: forward, backward and SGD with momentum on 32x32 pixels; with
steps, after a PGD attack of so many. Stock is channels_last in bfloat16 autocast, compiled unless
it says otherwise. Every column's first update points where eager's does.

"""

ZOO = """\
`python benchmarks/zoo.py`, or `dwf doctor --zoo`: 100 test images of digits, suite `quick`, epsilon
0.15 (honest models: that of their training). Truth is what the adaptive attack of each broken model
leaves. Found: the number is within 5 points of it; flagged: it is not, and the verdict says so.
[Findings](findings.md) explains the names.
"""

CHECKS = """\
`python benchmarks/checks_share.py`: suite `standard` on 100 test images of digits. CPU seconds
of the attacks, and of every check as a percentage of them; the aim is 15 in all.
"""

ATTACK_BENCH = """\
`python benchmarks/attack_bench.py`, by the protocol of AttackBench (arXiv:2404.19460) on models
trained here; its own five networks are not to be had. Every attack may propagate an image 2,000
times, forward or backward, and its closest image that fools the model counts. Optimality is 100 if
that is the closest of all attacks' for every image, and 0 if nothing is found; areas are those
under curves of robust accuracy over epsilon. All attacks run by autograd in float32. Attacks of a
fixed radius bisect it for each image; ours do so by `minimum_norm(..., num_radii=...)`.
"""

HARD_ROUTED = """\
The same presets with hard gates, trained with seed 0, judged by suite `standard` on the first 200
test images of digits at epsilon 0.15. Percent that stand, in turn: after APGD-CE, APGD-T, FAB-T on
the whole mixture, after its views, after Square, after everything. The grid above left 70 % (Robust
Experts, ADVMoE), 74 % (Synergy-of-Experts) and 77 % (RT-ER) of 500, three seeds or one: these lower
numbers are the ones to quote. A 95 % interval is +-7 points. The verdict is that of the commit that
judged; see `evaluated` in the rows.
"""

CIFAR = """\
10,000 training images of CIFAR-10, 500 test images, 8/255, suite `paper`, one seed, networks small
enough for two CPU cores. The recipes work; networks of this size are far below what the methods can
do. The intervals are +-3.8 points, so only the ends of the clean column differ for certain. Robust
Experts is BlockMoE, two of four blocks an image, entropy loss, GAP-FC gate.

"""
