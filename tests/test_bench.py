"""bench.py times two forms of the same work; here they compute the same."""

import torch

import fsm
import hpdm
from benchmarks import bench_steps


def test_the_published_structure_gives_the_same_outputs_loss_and_gradients():
    s = bench_steps.Setting(quick=True)
    present = torch.tensor([[True, False, True, True], [False, False, False, True]])
    s.net.eval()  # no dropout
    ours, plain = s.net(s.images, present), bench_steps.plain_forward(s.net, s.images, present)
    torch.testing.assert_close(ours.logits, plain.logits, rtol=1e-3, atol=1e-4)
    for a, b in zip(ours.per_modality, plain.per_modality, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        target = s.teacher(s.images).per_modality
    gradients = []
    for out, distance in ((ours, hpdm.hpdm_loss), (plain, bench_steps.plain_hpdm)):
        s.net.zero_grad()
        loss = distance(out.per_modality, target, s.labels, present, s.match, s.k)
        loss.backward()
        gradients.append((loss.detach(), s.net.stages[0].embed.proj.weight.grad.clone()))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-5)


def test_a_stage_2_step_moves_the_student():
    s = bench_steps.Setting(quick=True)
    selection = fsm.FSM(s.net.widths, s.k, s.m).requires_grad_(False)
    before = s.net.decoder.classify.weight.clone()
    bench_steps.stage2_step(s.net, s.teacher, s.teacher, selection, s.images, s.labels, s.full)()
    assert not torch.equal(before, s.net.decoder.classify.weight)
