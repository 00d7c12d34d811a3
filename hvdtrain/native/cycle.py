"""When Horovod's background thread asks the other ranks whether there is anything to do."""

from __future__ import annotations

from hvdtrain.native.mend import Mend


def for_the_cycle() -> list[Mend]:
    """What makes a collective begin when the last rank has it, and an idle thread cost nothing to speak of.

    As released, the thread asks every millisecond, an eighth of a core's time, and what is handed to it waits for the
    next millisecond, so that there may be more to fuse by then. All ranks take part in each asking, so the slowest
    pace is everyone's. Now:

    - After ten times of nothing it asks every 5 ms.
    - With Gloo and nothing to fuse (hvdtrain's exchange), it is woken by what is handed to it, and otherwise asks
      every 50 ms; while it has something that others have not, it does not sleep but blocks in the asking, for those
      who have nothing, until they are woken. (MPI would spin there.) Where there are several process sets it asks every
      5 ms: whoever belongs to two of them, and is asked in one, answers late in the other.
    """
    operations, queue = "horovod/common/operations.cc", "horovod/common/tensor_queue"
    sleep = "    std::this_thread::sleep_for(sleep_duration);\n"
    responses = (
        "      int global_rank = state.global_controller->GetRank();\n"
        "      for (auto& response : response_list.responses()) {\n"
    )
    shut_down = "    horovod_global.timeline.Shutdown();\n    horovod_global.shut_down = true;\n"
    one = "  tensor_table_.emplace(e.tensor_name, std::move(e));\n"
    several = "    message_queue_.push(std::move(messages[i]));\n  }\n"
    return [
        Mend(
            operations,
            "  auto sleep_duration = state.last_cycle_start +\n"
            "                        std::chrono::microseconds(long(\n"
            "                            state.parameter_manager.CycleTimeMs() * 1000.)) -\n"
            "                        start_time;\n",
            "  static int idle_cycles = 0;\n"
            "  double cycle_ms = state.parameter_manager.CycleTimeMs();\n"
            "  bool at_once = state.control_operation == LibType::GLOO &&\n"
            "                 state.parameter_manager.TensorFusionThresholdBytes() == 0;\n"
            "  if (at_once) {\n"
            "    auto process_sets = state.process_set_table.Ids();\n"
            "    bool waiting = false;\n"
            "    for (auto id : process_sets) {\n"
            "      waiting |= state.process_set_table.Get(id).tensor_queue.HasTensors();\n"
            "    }\n"
            "    cycle_ms = waiting ? std::min(cycle_ms, .2)\n"
            "                       : std::max(cycle_ms, process_sets.size() > 1 ? 5. : 50.);\n"
            "  } else if (idle_cycles > 10) {\n"
            "    cycle_ms = std::max(cycle_ms, 5.);\n"
            "  }\n"
            "  ++idle_cycles;\n"
            "  auto sleep_duration = state.last_cycle_start +\n"
            "                        std::chrono::microseconds(long(cycle_ms * 1000.)) -\n"
            "                        start_time;\n",
        ),
        Mend(
            operations,
            sleep + "  }\n  state.last_cycle_start",
            "    if (at_once) {\n"
            "      doorbell.Wait(sleep_duration);\n"
            "    } else {\n"
            "  " + sleep + "    }\n  }\n  state.last_cycle_start",
        ),
        Mend(operations, shut_down, shut_down + "    doorbell.Ring();\n"),
        Mend(operations, responses, responses + "        idle_cycles = 0;\n"),
        Mend(
            f"{queue}.h",
            "#include <iostream>\n",
            "#include <chrono>\n#include <condition_variable>\n#include <iostream>\n",
        ),
        Mend(
            f"{queue}.h",
            "class TensorQueue {\npublic:\n",
            "// Wakes the background thread when tensors are handed to it.\n"
            "class Doorbell {\n"
            "public:\n"
            "  void Ring() {\n"
            "    std::lock_guard<std::mutex> guard(mutex_);\n"
            "    rung_ = true;\n"
            "    changed_.notify_one();\n"
            "  }\n"
            "  void Wait(std::chrono::steady_clock::duration longest) {\n"
            "    std::unique_lock<std::mutex> lock(mutex_);\n"
            "    changed_.wait_for(lock, longest, [this] { return rung_; });\n"
            "    rung_ = false;\n"
            "  }\n"
            "\n"
            "private:\n"
            "  std::mutex mutex_;\n"
            "  std::condition_variable changed_;\n"
            "  bool rung_ = false;\n"
            "};\n"
            "inline Doorbell doorbell;\n"
            "\n"
            "class TensorQueue {\n"
            "public:\n"
            "  bool HasTensors() const {\n"
            "    std::lock_guard<std::mutex> guard(mutex_);\n"
            "    return !tensor_table_.empty();\n"
            "  }\n",
        ),
        Mend(f"{queue}.cc", one, one + "  doorbell.Ring();\n"),
        Mend(f"{queue}.cc", several, several + "  doorbell.Ring();\n"),
    ]
