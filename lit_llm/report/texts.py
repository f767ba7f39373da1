"""The texts of the report in English and Chinese; names of metrics, keys and sources are the same in both."""

import html

TEXTS = {
    "report": ("Run report", "训练报告"), "comparison": ("Comparison of runs", "训练对比"),
    "switch": ("中文", "English"),
    # state of a run
    "running": ("running", "训练中"), "finished": ("finished", "已完成"), "stopped": ("stopped", "已停止"),
    "failed": ("failed", "出错"), "killed": ("killed", "被强制终止"), "unknown": ("state unknown", "状态未知"),
    "say_running": ("The run is in progress; this page is written again at each validation.",
                    "训练仍在进行；每次验证后会重新生成本页。"),
    "say_finished": ("The run reached its last step.", "训练已到达最后一步。"),
    "say_stopped": ("The run was stopped by a signal, with a checkpoint if it had made a step.",
                    "训练收到信号后停止；若已完成至少一步，则已保存检查点。"),
    "say_failed": ("The run ended with an error.", "训练因错误而结束。"),
    "say_killed": ("The process of this run ended without a last word, as after kill -9, a crash or a power failure.",
                   "训练进程未正常退出即结束（例如 kill -9、崩溃或断电）。"),
    "say_unknown": ("This folder has no run.json, so it is not known how the run ended.",
                    "此目录没有 run.json，因此不知道训练如何结束。"),
    "last_step": ("last logged step", "最后记录的步"), "saved_step": ("last checkpoint", "最后的检查点"),
    "planned": ("planned steps", "计划步数"), "none": ("none", "无"), "not_known": ("not known", "未知"),
    "to_resume": ("Resume it with", "继续训练："), "reason": ("Reason", "原因"),
    # sections
    "curves": ("Curves", "曲线"), "metrics": ("Metrics", "指标"), "checkpoints": ("Checkpoints", "检查点"),
    "samples": ("Samples during training", "训练过程中的回答"), "answers": ("Answers at the end", "训练后的回答"),
    "data": ("Data", "数据"), "evaluations": ("Evaluations", "评估"),
    "config": ("Settings that differ from the defaults", "与默认值不同的设置"),
    "differences": ("Settings that differ between the runs", "各次训练之间不同的设置"),
    "cost": ("Cost", "开销"), "commands": ("Commands", "命令"), "versions": ("Versions and hardware", "版本与硬件"),
    "warnings": ("Warnings", "警告"), "more_curves": ("Other metrics", "其他指标"),
    # charts
    "loss": ("Training loss (nats per supervised token)", "训练损失（每个计入损失的 token，nat）"),
    "nll": ("Validation NLL (nats per supervised token)", "验证集 NLL（每个计入损失的 token，nat）"),
    "rise": ("Rise of the loss of the guard documents (nats per token)", "守护文档损失的上升（每个 token，nat）"),
    "guard": ("NLL of the guard documents (nats per token)", "守护文档的 NLL（每个 token，nat）"),
    "lr": ("Learning rate", "学习率"), "grad_norm": ("Gradient norm before clipping", "裁剪前的梯度范数"),
    "speed": ("Tokens per second, all devices", "每秒 token 数（所有设备）"),
    "memory": ("Peak memory of the first device (GiB)", "首个设备的内存峰值（GiB）"),
    "hint": ("Move the pointer over a curve, or focus it and use the arrow keys. ★ marks the best checkpoint.",
             "将指针移到曲线上，或选中图表后用方向键查看数值。★ 为最佳检查点。"),
    # intervals, breakdowns and forgetting
    "interval": ("Ranges are 95 % intervals over documents.", "范围为按文档计算的 95% 置信区间。"),
    "rise_short": ("rise", "上升"), "interval_95": ("95 % interval", "95% 置信区间"),
    "accuracy": ("token accuracy", "token 准确率"),
    "breakdown": ("Newest validation by source, answer and position", "最近一次验证：按数据源、回答与位置"),
    "nth_answer": ("answer of the conversation", "对话中的第几个回答"),
    "positions": ("position in the context", "上下文中的位置"), "documents": ("documents", "文档"),
    "forgetting": ("Forgetting", "遗忘"), "worse": ("documents that got worse", "变差的文档"),
    "say_forgetting": ("The loss of the guard documents (data.guard_sources), compared with the same documents before "
                       "training.", "守护文档（data.guard_sources）的损失，与训练前同一批文档比较。"),
    "forgot": ("The loss has risen beyond its interval: the model has become worse on these documents.",
               "损失的上升超出置信区间：模型在这些文档上变差了。"),
    # columns
    "metric": ("metric", "指标"), "before": ("before training", "训练前"), "best": ("best checkpoint", "最佳检查点"),
    "last": ("last checkpoint", "最后的检查点"), "step": ("step", "步"), "name": ("name", "名称"),
    "answer": ("answer", "回答"), "finish": ("ended by", "结束原因"),
    "score": ("score", "得分"), "run": ("run", "训练"), "state": ("state", "状态"),
    "source": ("source", "数据源"), "sequences": ("sequences", "序列"), "tokens": ("tokens", "token 数"),
    "supervised": ("supervised", "计入损失"), "share": ("share", "占比"), "speaker": ("speaker", "角色"),
    "read": ("records read", "读取的记录"), "kept": ("kept", "保留"), "dropped": ("dropped", "丢弃"),
    "count": ("count", "数量"), "first": ("first at", "首个位置"), "key": ("key", "键"), "value": ("value", "值"),
    "default": ("default", "默认值"), "verb": ("command", "命令"), "time": ("time", "时间"),
    "checkpoint": ("checkpoint", "检查点"), "other_data": ("other data", "数据不同之处"),
    # data
    "mask": ("Mask audit: which tokens are supervised", "掩码检查：哪些 token 计入损失"),
    "ledger": ("Drawn in training so far", "训练中已抽取的数据"), "stages": ("Sequences", "序列统计"),
    "skipped": ("Skipped, cut and noted", "跳过、截断与提示"),
    "rows": ("packed sequences", "打包后的序列"),
    "duplicates": ("exact duplicates of earlier records", "与先前记录完全重复"),
    "duplicates_left_out": ("left out: exact duplicates of earlier records", "未使用：与先前记录完全重复"),
    "cut": ("longer than data.seq_len and cut", "超过 data.seq_len，已截断"),
    "cut_in_an_answer": ("cut within an answer, whose stop token is lost", "在回答中间被截断，失去停止符"),
    "dropped_overlong": ("left out: longer than data.seq_len", "未使用：超过 data.seq_len"),
    "dropped_nothing_left": ("left out: no supervised token within data.seq_len",
                             "未使用：data.seq_len 之内没有计入损失的 token"),
    "also_in_train": ("exact duplicates of training records", "与训练数据完全重复"),
    "train": ("training", "训练集"), "val": ("validation", "验证集"), "test": ("test", "测试集"),
    "quarantined": ("bad records set aside", "搁置的坏记录"),
    "stopless": ("conversations without a supervised stop token", "没有计入损失的停止符的对话"),
    "cleaned": ("records whose white space was cleaned", "清理过空白的记录"),
    "double_bos": ("sequences that begin with two BOS tokens", "以两个 BOS token 开头的序列"),
    # samples
    "prompt": ("prompt", "提示"), "expected": ("expected", "参考回答"), "base": ("base model", "基座模型"),
    "tuned": ("trained model", "训练后的模型"),
    "trained": ("trained on", "训练数据"), "held out": ("held out", "留出数据"),
    # cost
    "seconds": ("wall time of the run, with repeated parts", "总用时（含重复部分）"),
    "training_seconds": ("of it, optimizer steps", "其中优化器步"),
    "report_seconds": ("of it, writing this report", "其中生成本报告"),
    "guard_seconds": ("of it, scoring the guard documents", "其中评估守护文档"),
    "tokens_computed": ("tokens trained on, with padding excluded", "训练的 token 数（不含填充）"),
    "tokens_per_second": ("tokens per second of training", "训练时每秒 token 数"),
    "flops_per_token": ("FLOPs per token, an estimate as in plan", "每个 token 的 FLOPs（与 plan 相同的估算）"),
    "flops": ("FLOPs in total, estimated", "FLOPs 总数（估算）"),
    "peak_flops": ("FLOP/s of the devices in their data sheets", "设备标称 FLOP/s"),
    "utilisation": ("utilisation: FLOP/s of training divided by that", "利用率：训练 FLOP/s 与标称值之比"),
    "unmeasured": ("What is not known is left open: the rate of a CPU is in no data sheet, and FLOPs are not counted "
                   "for models of another class.",
                   "未知的值不填写：CPU 没有标称算力；其他类的模型不统计 FLOPs。"),
    # commands
    "chat": ("Chat with the exported model", "与导出的模型对话"), "serve": ("Serve it over HTTP", "通过 HTTP 提供服务"),
    "export": ("Export the best checkpoint", "导出最佳检查点"), "resume": ("Resume the run", "继续训练"),
    "further": ("Train twice as long", "训练两倍时长"),
    "validate": ("Measure the best checkpoint again", "重新评估最佳检查点"),
    "again": ("Write this report again", "重新生成本报告"),
    "total": ("parameters", "参数量"), "trainable": ("trained parameters", "训练的参数量"),
}


def text(key: str) -> str:
    """A text in both languages as HTML, of which the page shows one; unknown keys are shown as they are."""
    if key not in TEXTS:
        return html.escape("".join(char for char in key if char.isprintable()))
    english, chinese = TEXTS[key]
    return (f'<span class="en" lang="en">{html.escape(english)}</span>'
            f'<span class="zh" lang="zh">{html.escape(chinese)}</span>')
